"""Adapters over rows in any order, as decoding has them: gathered by adapter, computed in one batch, put back.

A adapters, M rows of one adapter (padded), N rows, I inputs, O outputs, R rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from knapper.engine.adapt import rank_padded
from knapper.engine.linear import FrozenLinear
from knapper.engine.lora import Lora
from knapper.engine.rows import padded, rows_padded


class Stack:
    """The tensors of several adapters side by side, ranks padded with zeros: one batched GEMM serves them all."""

    def __init__(self, loras: Sequence[Lora]) -> None:
        assert loras
        self.loras = tuple(loras)
        self._scale = next(iter(loras[0].a.values())).new_tensor([lora.scale for lora in loras])[:, None, None]
        self._stacked: dict[tuple[str, ...], tuple[Tensor, list[Tensor | None]] | None] = {}

    def of(self, names: Sequence[str]) -> tuple[Tensor, list[Tensor | None]] | None:
        """A^T of the sites side by side (A, I, sum of R) and B^T by site (A, R, O); None when no adapter has any."""
        key = tuple(names)
        if key not in self._stacked:
            self._stacked[key] = self._build(key)
        return self._stacked[key]

    @property
    def scale(self) -> Tensor:
        return self._scale

    def _build(self, names: tuple[str, ...]) -> tuple[Tensor, list[Tensor | None]] | None:
        having = [[lora for lora in self.loras if name in lora.a] for name in names]
        if not any(having):
            return None
        a_parts: list[Tensor] = []
        b_parts: list[Tensor | None] = []
        for name, some in zip(names, having, strict=True):
            if not some:
                b_parts.append(None)
                continue
            rank = rank_padded(max(lora.a[name].shape[0] for lora in some))
            first_a, first_b = some[0].a[name], some[0].b[name]
            a = first_a.new_zeros(len(self.loras), first_a.shape[1], rank)
            b = first_b.new_zeros(len(self.loras), rank, first_b.shape[0])
            for index, lora in enumerate(self.loras):
                if name in lora.a:
                    own = lora.a[name].shape[0]
                    a[index, :, :own] = lora.a[name].T
                    b[index, :own] = lora.b[name].T
            a_parts.append(a)
            b_parts.append(b)
        return torch.cat(a_parts, dim=2), b_parts


class Scattered:
    """knapper.engine.adapt.Adapt of one decoding step."""

    def __init__(self, stack: Stack, row_loras: Sequence[Lora | None], device: torch.device) -> None:
        """`row_loras`: for each row its adapter, one of the stack's, or None for the base model."""
        place = {id(lora): index for index, lora in enumerate(stack.loras)}
        by_adapter: list[list[int]] = [[] for _ in stack.loras]
        for row, lora in enumerate(row_loras):
            if lora is not None:
                by_adapter[place[id(lora)]].append(row)
        self._stack = stack
        # One adapter for all rows, as often: they lie as its product wants them.
        self._straight = len(by_adapter) == 1 and len(by_adapter[0]) == len(row_loras)
        width = rows_padded(max(len(rows) for rows in by_adapter))
        # Padding gathers row 0: its product is computed and never put back.
        gather = [rows + [0] * (width - len(rows)) for rows in by_adapter]
        self._gather = _indices([row for rows in gather for row in rows], device)
        self._width = width
        self._rows = _indices([row for rows in by_adapter for row in rows], device)
        self._where = _indices([a * width + m for a, rows in enumerate(by_adapter) for m in range(len(rows))], device)

    def __call__(self, names: Sequence[str], x_NI: Tensor, linear: FrozenLinear) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = linear(x_NI).split(linear.widths, dim=1)
        stacked = self._stack.of(names)
        if stacked is None:
            return parts
        a_AIR, b_parts = stacked
        rows_NI = padded(x_NI) if self._straight else x_NI.index_select(0, self._gather)
        x_AMI = rows_NI.view(a_AIR.shape[0], self._width, -1).to(a_AIR.dtype)
        low = torch.bmm(x_AMI, a_AIR) * self._stack.scale
        lows = iter(low.split([b.shape[1] for b in b_parts if b is not None], dim=2))
        sums = [
            part if b is None else self._added(part, torch.bmm(next(lows), b))
            for part, b in zip(parts, b_parts, strict=True)
        ]
        return tuple(sums)

    def _added(self, y_NO: Tensor, delta_AMO: Tensor) -> Tensor:
        if self._straight:
            return (y_NO + delta_AMO[0, : y_NO.shape[0]]).to(y_NO.dtype)
        delta = delta_AMO.flatten(0, 1).index_select(0, self._where)
        full = delta.new_zeros(y_NO.shape).index_copy_(0, self._rows, delta)
        return (y_NO + full).to(y_NO.dtype)


def _indices(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)
