"""LoRA over rows in any order, for decoding: gathered by adapter, computed in one batch, scattered back.

The BGMV of multi-LoRA serving (Punica, arXiv 2310.18547). Adapters of the same target modules and ranks share batched
products, in which each has the shape that it has alone: other decoding sequences change no bit. A adapters, X blocks of
rows, M rows of a block, N rows, I inputs, O outputs, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from knapper.engine.layers.adapters import for_products, pad_rank, padded_rank
from knapper.engine.layers.batch_invariance import RowLayout, adapters_product
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.transfer import to_device

_Shape = tuple[tuple[str, int], ...]  # padded ranks by target module


class Stack:
    """The tensors of several adapters, ranks padded with zeros; adapters of one shape are stacked."""

    def __init__(self, loras: Sequence[Lora]) -> None:
        assert loras
        self.loras = tuple(loras)
        by_shape: dict[_Shape, list[Lora]] = {}
        for lora in loras:
            by_shape.setdefault(tuple((target, padded_rank(a.shape[-2])) for target, a in lora.a.items()), []).append(
                lora
            )
        self.groups = [AdapterGroup(group) for group in by_shape.values()]


class AdapterGroup:
    """Adapters of the same target modules and ranks."""

    def __init__(self, loras: Sequence[Lora]) -> None:
        self.loras = loras
        first = next(iter(loras[0].a.values()))
        self.rank = padded_rank(first.shape[-2])
        scales_A = to_device(
            [lora.scale for lora in loras], first.device, torch.promote_types(first.dtype, torch.float32)
        )
        self.scale_A11 = scales_A[:, None, None]
        self._stacked: dict[tuple[str, ...], tuple[Tensor, list[Tensor | None]] | None] = {}

    def of(self, names: Sequence[str], x_N: Tensor) -> tuple[Tensor, list[Tensor | None]] | None:
        """A of the target modules side by side (A, sum of R, I), B by target module (A, O, R), for products with rows
        such as `x_N`; None without any.
        """

        def stacked(matrices: Sequence[Tensor], dim: int) -> Tensor:
            return for_products(torch.stack([pad_rank(matrix, dim) for matrix in matrices]), x_N)

        key = tuple(names)
        if key not in self._stacked:
            adapted = [name for name in names if name in self.loras[0].a]
            self._stacked[key] = None if not adapted else (
                torch.cat([stacked([lora.a[name] for lora in self.loras], 0) for name in adapted], 1),
                [stacked([lora.b[name] for lora in self.loras], 1) if name in adapted else None for name in names],
            )  # fmt: skip
        return self._stacked[key]


class GatheredLora:
    """knapper.engine.layers.adapters.Adapt of one decoding step."""

    def __init__(self, stack: Stack, row_loras: Sequence[Lora | None], device: torch.device) -> None:
        """`row_loras`: each row's adapter, one of the stack's, or None for the base model."""
        rows: dict[int, list[int]] = {}
        for row, lora in enumerate(row_loras):
            if lora is not None:
                rows.setdefault(id(lora), []).append(row)
        self._device = device
        self.loras = stack.loras
        self._row_loras = row_loras
        self._groups = [
            (group, members)
            for group in stack.groups
            if any(members := [rows.get(id(lora), []) for lora in group.loras])
        ]
        # One adapter for all rows, as often: the rows need no gathering.
        lone = len(self._groups) == 1 and len(self._groups[0][1]) == 1
        self._in_order = lone and len(self._groups[0][1][0]) == len(row_loras)
        self._blocks: dict[tuple[int, RowLayout], _Blocks] = {}

    @cached_property
    def _numbers(self) -> Tensor:
        places = {id(lora): place for place, lora in enumerate(self.loras)}
        return _indices([len(places) if lora is None else places[id(lora)] for lora in self._row_loras], self._device)

    def numbers(self, rows: int, device: torch.device) -> Tensor:  # noqa: ARG002  the protocol's, for passes of any rows
        return self._numbers

    def __call__(self, names: Sequence[str], x_NI: Tensor, linear: FrozenLinear) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = linear(x_NI).split(linear.widths, dim=1)
        for index, (group, members) in enumerate(self._groups):
            stacked = group.of(names, x_NI)
            if stacked is not None:
                a_ARI, b_parts = stacked
                layout = linear.exactness.adapter(group.rank, a_ARI)
                if (index, layout) not in self._blocks:
                    self._blocks[index, layout] = _blocks(members, layout, self._device)
                parts = self._added(parts, x_NI, group, a_ARI, b_parts, self._blocks[index, layout])
        return parts

    def _added(
        self,
        parts: tuple[Tensor, ...],
        x_NI: Tensor,
        group: AdapterGroup,
        a_ARI: Tensor,
        b_parts: Sequence[Tensor | None],
        blocks: "_Blocks",
    ) -> tuple[Tensor, ...]:
        if self._in_order:
            rows_NI = torch.cat([x_NI, x_NI.new_zeros(blocks.rows - len(x_NI), x_NI.shape[1])])
        else:
            rows_NI = x_NI.index_select(0, blocks.gather)
        x_XMI = rows_NI.view(-1, blocks.width, x_NI.shape[1]).to(a_ARI.dtype)
        low_XMR = adapters_product(blocks.layout, x_XMI, blocks.of(a_ARI)) * blocks.of(group.scale_A11)
        low_XMR = low_XMR.to(a_ARI.dtype)
        lows = iter(low_XMR.split(group.rank, dim=2))
        return tuple(
            part
            if b_AOR is None
            else self._sum(part, adapters_product(blocks.layout, next(lows), blocks.of(b_AOR)).flatten(0, 1), blocks)
            for part, b_AOR in zip(parts, b_parts, strict=True)
        )

    def _sum(self, y_NO: Tensor, delta: Tensor, blocks: "_Blocks") -> Tensor:
        if self._in_order:
            return (y_NO + delta[: len(y_NO)]).to(y_NO.dtype)
        full = delta.new_zeros(y_NO.shape).index_copy_(0, blocks.group_rows, delta.index_select(0, blocks.block_rows))
        return (y_NO + full).to(y_NO.dtype)


@dataclass(frozen=True)
class _Blocks:
    """Row indices of a group: each adapter's in blocks of `width`, padded with row 0, whose output is dropped."""

    layout: RowLayout
    width: int
    adapters: Tensor  # of each block
    gather: Tensor
    group_rows: Tensor
    block_rows: Tensor
    one_each: bool  # one block for each adapter, in order

    @property
    def rows(self) -> int:
        return self.width * len(self.adapters)

    def of(self, stacked: Tensor) -> Tensor:
        """The adapters' tensors, by block."""
        if self.one_each:
            return stacked
        if len(stacked) == 1:
            return stacked.expand(len(self.adapters), *stacked.shape[1:])
        return stacked.index_select(0, self.adapters)


def _blocks(members: Sequence[Sequence[int]], layout: RowLayout, device: torch.device) -> _Blocks:
    width = layout.block or layout.rows(max(len(rows) for rows in members))
    blocks = [
        (adapter, rows[start : start + width])
        for adapter, rows in enumerate(members)
        for start in range(0, max(1, len(rows)) if not layout.block else len(rows), width)
    ]
    adapters = [adapter for adapter, _ in blocks]
    return _Blocks(
        layout,
        width,
        _indices(adapters, device),
        _indices([row for _, rows in blocks for row in [*rows, *[0] * (width - len(rows))]], device),
        _indices([row for _, rows in blocks for row in rows], device),
        _indices(
            [block * width + offset for block, (_, rows) in enumerate(blocks) for offset in range(len(rows))], device
        ),
        adapters == list(range(len(members))),
    )


def _indices(values: Sequence[int], device: torch.device) -> Tensor:
    return to_device(values, device, torch.int64)
