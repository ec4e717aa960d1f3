"""Recurrences whose memory takes up a chunk of rows at once: a convolution, then `delta_rule`.

N rows, X elements of a row, C rows of a chunk, H value heads, G key heads, D elements of a key, E of a value.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers import delta_rule, gradient
from knapper.engine.layers.delta_rule import ChunkState, Rows, Solve
from knapper.engine.layers.recurrence import Convolution, PackedRows, State, Stops, stops
from knapper.engine.models.recurrent import CHUNK_ROWS
from knapper.engine.transfer import to_device


@dataclass(frozen=True)
class ChunkLayout:
    """Where the chunks' rows lie among N packed rows, N for none; where these lie in the chunks; chunks by number."""

    rows_C: Tensor
    places_N: Tensor
    sizes: tuple[int, ...]
    order: tuple[int, ...]  # of the sequences in each number, the longest first

    @classmethod
    def of(cls, lengths: Sequence[int], start: int, device: torch.device) -> "ChunkLayout":
        before = start % CHUNK_ROWS  # rows of the first chunk that are in the state
        counts = [-(-(before + length) // CHUNK_ROWS) for length in lengths]
        order = sorted(range(len(lengths)), key=lambda sequence: -counts[sequence])
        firsts, total = list(accumulate(lengths, initial=0)), sum(lengths)
        rows, sizes = [], []
        for number in range(counts[order[0]]):
            members = [sequence for sequence in order if counts[sequence] > number]
            sizes.append(len(members))
            at_C = np.arange(number * CHUNK_ROWS, (number + 1) * CHUNK_ROWS) - before
            for sequence in members:
                inside = (at_C >= 0) & (at_C < lengths[sequence])
                rows.append(np.where(inside, firsts[sequence] + at_C, total))
        rows_C = np.concatenate(rows)
        places_N = np.empty(total, dtype=np.int64)
        inside = rows_C < total
        places_N[rows_C[inside]] = np.flatnonzero(inside)
        return cls(to_device(rows_C, device), to_device(places_N, device), tuple(sizes), tuple(order))


@dataclass(frozen=True)
class ChunkedRecurrence(ABC):
    """knapper.engine.layers.recurrence.Recurrence of rows (N, X): what the convolution takes, then numbers by head.

    The state: the convolution's, then ChunkState's tensors. `corrects`: whether a row corrects what the memory has of
    its key, or adds to it.
    """

    convolution: Convolution
    corrects: ClassVar[bool]

    @abstractmethod
    def rows(self, convolved_NX: Tensor, more_NX: Tensor) -> Rows:
        """q and k (N, G, D), v (N, H, E), g and beta (N, H)."""

    @abstractmethod
    def finished(self, o_NHE: Tensor, rows: Rows) -> Tensor:
        """(N, H E), of what the memory gives."""

    def packed(self, x_NX: Tensor, rows: PackedRows, *, keeps: bool) -> tuple[Tensor, list[Stops]]:
        solve = delta_rule.substituted if self.corrects else None
        if x_NX.requires_grad and torch.is_grad_enabled():
            y_NY = _Recomputed.apply(self, rows, solve, x_NX)  # type: ignore[no-untyped-call]  # the library has no types here
            assert isinstance(y_NY, Tensor)
            return y_NY, []
        return self.computed(x_NX, rows, solve, keeps=keeps)

    def computed(
        self, x_NX: Tensor, rows: PackedRows, solve: Solve | None, *, keeps: bool = False
    ) -> tuple[Tensor, list[Stops]]:
        layout = rows.once(ChunkLayout, lambda: ChunkLayout.of(rows.lengths, rows.start, x_NX.device))
        taken_NX, more_NX = self._split(x_NX)
        of_convolution = PackedRows(rows.lengths, rows.start, rows.state and rows.state[:1], rows._made)
        convolved, last = self.convolution.packed(taken_NX, of_convolution, keeps=keeps)
        made = self.rows(convolved, more_NX)
        chunked, before = _chunked(made, layout), None
        if rows.state is not None:
            before = ChunkState(*(part[None] for part in rows.state[1:]))
            chunked = _begun(chunked, before)
        o, states = delta_rule.outputs(chunked, layout.sizes, before, solve)
        o_NHE = o.reshape(-1, *o.shape[2:]).flatten(1).index_select(0, layout.places_N).unflatten(1, o.shape[2:])
        y_NY = self.finished(o_NHE, made)
        if not keeps:
            return y_NY, []
        kept = _kept(states, layout, rows)
        both = zip(last, kept, strict=True)
        return y_NY, [{stop: (*first[stop], *then[stop]) for stop in first} for first, then in both]

    def step(self, x_NX: Tensor, state: State, at_N: Tensor) -> Tensor:
        taken_NX, more_NX = self._split(x_NX)
        rows = self.rows(self.convolution.step(taken_NX, state[:1], at_N), more_NX)
        return self.finished(delta_rule.step(rows, ChunkState(*state[1:]), at_N, corrects=self.corrects), rows)

    def _split(self, x_NX: Tensor) -> tuple[Tensor, Tensor]:
        width = self.convolution.weight_KX.shape[1]
        return x_NX[:, :width], x_NX[:, width:]


@torch.inference_mode()
def is_invariant(recurrence: ChunkedRecurrence, numbers: int, device: torch.device) -> bool:
    """Whether on this device a row has the same bits in a text, in its beginning, as its rest, and decoded.

    `numbers`: by which a row is longer than the convolution is wide.
    """
    tokens, width = 2 * CHUNK_ROWS + 7, recurrence.convolution.weight_KX.shape[1] + numbers
    x_NX = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(device)
    whole, _ = recurrence.packed(x_NX, PackedRows([tokens]), keeps=False)
    for count in (1, 9, CHUNK_ROWS, CHUNK_ROWS + 12):
        beginning, [kept] = recurrence.packed(x_NX[:count], PackedRows([count]), keeps=True)
        beside = PackedRows([tokens - count], count, kept[count])
        rest, _ = recurrence.packed(x_NX[count:], beside, keeps=False)
        several = PackedRows([tokens, count])
        crowd, _ = recurrence.packed(torch.cat([x_NX, x_NX[:count]]), several, keeps=False)
        state = tuple(part[None].clone() for part in kept[count])
        row = recurrence.step(x_NX[count, None], state, torch.tensor([count], device=device))
        alike = (
            (beginning, whole[:count]),
            (rest, whole[count:]),
            (crowd[tokens:], whole[:count]),
            (row[0], whole[count]),
        )
        if not all(torch.equal(*pair) for pair in alike):
            return False
    return True


class _Recomputed(torch.autograd.Function):
    """Keeps its input alone: the backward pass computes it again, with the library's own solver, and differentiates."""

    @staticmethod
    def forward(ctx: Any, recurrence: ChunkedRecurrence, rows: PackedRows, solve: Solve | None, x_NX: Tensor) -> Tensor:
        ctx.recurrence, ctx.rows = recurrence, rows
        ctx.save_for_backward(x_NX)
        return recurrence.computed(x_NX, rows, solve)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, Tensor | None]:
        (x_NX,) = ctx.saved_tensors
        x_NX = x_NX.detach().requires_grad_()
        with torch.enable_grad():
            solve = delta_rule.triangular if ctx.recurrence.corrects else None
            y_NY, _ = ctx.recurrence.computed(x_NX, ctx.rows, solve)
        gradient.backward(y_NY, grads[0])
        return None, None, None, x_NX.grad


def _chunked(rows: Rows, layout: ChunkLayout) -> Rows:
    """(B, C, ...), a chunk each; zeros where it has no row."""
    flat = [part.flatten(1) for part in rows]
    joined = F.pad(torch.cat(flat, dim=1), (0, 0, 0, 1)).index_select(0, layout.rows_C)
    parts = joined.split([part.shape[1] for part in flat], dim=1)
    return Rows(*(part.reshape(-1, CHUNK_ROWS, *of.shape[1:]) for part, of in zip(parts, rows, strict=True)))


def _begun(rows: Rows, before: ChunkState) -> Rows:
    """With the rows of the state in the first chunk. Their beta is zero: what they correct is known."""
    k, g = rows.k.clone(), rows.g.clone()
    k[:1] += before.k.transpose(1, 2)
    g[:1] += before.g.transpose(1, 2)
    return rows._replace(k=k, g=g)


def _kept(states: Sequence[ChunkState], layout: ChunkLayout, rows: PackedRows) -> list[Stops]:
    """Of each sequence, without the convolution's part."""
    kept: list[Stops] = [{} for _ in rows.lengths]
    first = rows.start // CHUNK_ROWS
    for place, sequence in enumerate(layout.order):
        for stop in stops(rows.start, rows.start + rows.lengths[sequence]):
            number, within = stop // CHUNK_ROWS - first, stop % CHUNK_ROWS
            if within:
                s, *of_rows = (part[place].clone() for part in states[number])
                for part in of_rows:  # (heads, C, ...)
                    part[:, within:] = 0
            else:
                full = ChunkState(*(part[place : place + 1] for part in states[number - 1]))
                s = delta_rule.folded(full)[0]
                of_rows = [torch.zeros_like(part[0]) for part in full[1:]]
            kept[sequence] = {**kept[sequence], stop: (s, *of_rows)}
    return kept
