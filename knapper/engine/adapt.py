"""How adapters enter the linears: several of them, each on its own rows, over one frozen base.

N rows, I inputs, O outputs, R rank, A adapters, M rows of one adapter (padded). delta = (scale * (x A^T)) B^T, in the
adapter's dtype (float32 for a trained one); the sum is rounded to the base's dtype once.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.config import HEAD, Facts
from knapper.engine.lora import Lora
from knapper.engine.rows import padded, rows_padded

# The fused linears of a layer and the sites that they stack.
sites: Final[dict[str, tuple[str, ...]]] = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
head_site: Final = HEAD
# A GEMM with fewer columns takes another kernel: a neighbour of higher rank would change bits.
_ranks_multiple: Final = 16


def site_shapes(config: Facts) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every site that an adapter may have."""
    return {site.name: (site.inputs, site.outputs) for site in config.sites}


def ranks_padded(matrix: Tensor, dim: int) -> Tensor:
    """A or B of an adapter with zeros along its rank `dim`, up to what a GEMM runs on whoever decodes beside it."""
    short = -matrix.shape[dim] % _ranks_multiple
    return matrix if short == 0 else F.pad(matrix, (0, 0) * (matrix.dim() - 1 - dim) + (0, short))


class Adapt(Protocol):
    """Adds the adapters' part to the output of one linear, rows by rows.

    `names`: the sites stacked in `y_NO`, of `widths` outputs each. Returns one tensor (N, width) for each.
    """

    def __call__(
        self, names: Sequence[str], widths: Sequence[int], x_NI: Tensor, y_NO: Tensor
    ) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) use `lora`; None is the base model. Rows of no segment use the base model too."""

    start: int
    stop: int
    lora: Lora | None


class Segments:
    """Adapters over consecutive rows, differentiable in their tensors: what training and prefill use."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        ordered = sorted(segments, key=lambda segment: segment.start)
        for before, after in itertools.pairwise(ordered):
            assert before.stop <= after.start, (
                f"segments overlap: {before.start}..{before.stop}, {after.start}..{after.stop}"
            )
        self._adapted = [(s.start, s.stop, s.lora) for s in ordered if s.lora is not None and s.stop > s.start]

    def __call__(self, names: Sequence[str], widths: Sequence[int], x_NI: Tensor, y_NO: Tensor) -> tuple[Tensor, ...]:
        parts = y_NO.split(list(widths), dim=1)
        deltas = [
            self._deltas(names, x_MI, lora)
            for x_MI, (_, _, lora) in zip(self._pieces(x_NI), self._adapted, strict=True)
        ]
        return tuple(
            self._added(part, [delta[index] for delta in deltas])
            if any(delta[index] is not None for delta in deltas)
            else part
            for index, part in enumerate(parts)
        )

    def _pieces(self, x_NI: Tensor) -> list[Tensor]:
        """The rows of each adapter. By one split: its gradient is one tensor, where each slice's would be one of N."""
        sizes: list[int] = []
        at = 0
        for start, stop, _ in self._adapted:
            sizes += [start - at, stop - start]
            at = stop
        sizes.append(x_NI.shape[0] - at)
        return list(x_NI.split(sizes)[1::2])

    def _deltas(self, names: Sequence[str], x_NI: Tensor, lora: Lora) -> list[Tensor | None]:
        """One (N, width) for each site, None where the adapter has none. The sites' A share one GEMM."""
        present = [name for name in names if name in lora.a]
        if not present:
            return [None] * len(names)
        a = [ranks_padded(lora.a[name], 0) for name in present]
        rows = x_NI.shape[0]
        low = F.linear(padded(x_NI.to(a[0].dtype)), a[0] if len(a) == 1 else torch.cat(a)) * lora.scale
        lows = dict(zip(present, low.split([part.shape[0] for part in a], dim=1), strict=True))
        return [F.linear(lows[name], ranks_padded(lora.b[name], 1))[:rows] if name in lows else None for name in names]

    def _added(self, y_NO: Tensor, deltas: Sequence[Tensor | None]) -> Tensor:
        pieces: list[Tensor] = []
        at = 0
        for (start, stop, _), delta in zip(self._adapted, deltas, strict=True):
            if delta is None:
                continue
            if start > at:
                pieces.append(delta.new_zeros(start - at, delta.shape[1]))
            pieces.append(delta)
            at = stop
        if at < y_NO.shape[0]:
            pieces.append(pieces[0].new_zeros(y_NO.shape[0] - at, y_NO.shape[1]))
        return (y_NO + (pieces[0] if len(pieces) == 1 else torch.cat(pieces))).to(y_NO.dtype)


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
            rank = -(-max(lora.a[name].shape[0] for lora in some) // _ranks_multiple) * _ranks_multiple
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
    """Adapters over rows in any order, for decoding: gathered by adapter, computed in one batch, put back."""

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

    def __call__(self, names: Sequence[str], widths: Sequence[int], x_NI: Tensor, y_NO: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = y_NO.split(list(widths), dim=1)
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


base: Final = Segments(())
