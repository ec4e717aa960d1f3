"""Mixers whose past is a state of fixed size: how a pass computes them, and what it leaves for later rows.

A row has the same bits among all rows of its sequence, after a state, or alone with one, whatever is computed beside
it. N rows, X elements of a row, K taps of a convolution.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.transfer import to_device

T = TypeVar("T")
State = tuple[Tensor, ...]  # of one sequence in one layer: tensors of the mixer's `state_shapes`, float32
Stops = Mapping[int, State]  # by number of tokens: the state after so many

STOP: Final = 64  # tokens: states are kept at 1, 2, 4... times so many, and after the last token


def stops(start: int, stop: int) -> Iterator[int]:
    """Where a sequence's states are kept for later prompts, of the tokens after `start` up to `stop`.

    So of what a prompt has in common with an earlier one more than half is reused, with few states each.
    """
    at = STOP
    while at < stop:
        if at > start:
            yield at
        at *= 2
    yield stop


@dataclass(frozen=True)
class PackedRows:
    """Sequences one after another, each from its first token; a single one may continue after `start`, from `state`."""

    lengths: Sequence[int]
    start: int = 0
    state: State | None = None
    _made: dict[object, Any] = field(default_factory=dict)

    def positions_N(self, device: torch.device) -> Tensor:
        """Of the rows in their sequences."""

        def make() -> Tensor:
            rows = [torch.arange(self.start, self.start + length) for length in self.lengths]
            return to_device(torch.cat(rows), device)

        return self.once(PackedRows.positions_N, make)

    def once(self, kind: object, make: Callable[[], T]) -> T:
        """What all layers of a pass need of the rows: made by the first."""
        if kind not in self._made:
            self._made[kind] = make()
        made: T = self._made[kind]
        return made


class Recurrence(Protocol):
    """A mixer's computation, of float32 rows (N, X)."""

    def packed(self, x_NX: Tensor, rows: PackedRows, *, keeps: bool) -> tuple[Tensor, list[Stops]]:
        """Outputs, and with `keeps` each sequence's states. Differentiable unless it continues."""
        ...

    def step(self, x_NX: Tensor, state: State, at_N: Tensor) -> Tensor:
        """A row for each of N sequences, at position `at_N`; `state` (N, ...) becomes that after the row.

        The same step again, after a failure, gives the same.
        """
        ...


@dataclass(frozen=True)
class Convolution:
    """Each channel's own, over the last K rows. The state: those rows, row t in place t modulo K.

    So a step overwrites only what no later one needs, and may be repeated.
    """

    weight_KX: Tensor
    bias_X: Tensor | None = None

    @property
    def taps(self) -> int:
        return len(self.weight_KX)

    def packed(self, x_NX: Tensor, rows: PackedRows, *, keeps: bool) -> tuple[Tensor, list[Stops]]:
        extended = self._extended(x_NX, rows)
        at_N, count = rows.positions_N(x_NX.device), len(x_NX)

        def row(before: int) -> Tensor:
            """Of each row, the one so many rows before it."""
            first = self.taps - 1 - before
            return torch.where(at_N[:, None] >= before, extended[first : first + count], 0.0)

        return self._summed([row(before) for before in reversed(range(self.taps))]), self._stops(
            extended, rows
        ) if keeps else []

    def step(self, x_NX: Tensor, state: State, at_N: Tensor) -> Tensor:
        (last_NKX,) = state
        of_N = torch.arange(len(at_N), device=at_N.device)
        last_NKX[of_N, at_N % self.taps] = x_NX
        past = [
            torch.where(at_N[:, None] >= before, last_NKX[of_N, (at_N - before) % self.taps], 0.0)
            for before in reversed(range(self.taps))
        ]
        return self._summed(past)

    def _summed(self, rows: Sequence[Tensor]) -> Tensor:
        """In one order, by operations of one element each: a row's bits depend on nothing else."""
        total = rows[0] * self.weight_KX[0]
        for row, weight_X in zip(rows[1:], self.weight_KX[1:], strict=True):
            total = total + row * weight_X
        return total if self.bias_X is None else total + self.bias_X

    def _extended(self, x_NX: Tensor, rows: PackedRows) -> Tensor:
        """The rows, after the K - 1 before them."""
        if rows.state is None:
            return F.pad(x_NX, (0, 0, self.taps - 1, 0))
        (last_KX,) = rows.state
        return torch.cat([last_KX.index_select(0, self._places(rows.start, self.taps - 1, x_NX.device)), x_NX])

    def _places(self, stop: int, count: int, device: torch.device) -> Tensor:
        """Where the state has the last `count` rows before `stop`."""
        return to_device([at % self.taps for at in range(stop - count, stop)], device, torch.int64)

    def _stops(self, extended: Tensor, rows: PackedRows) -> list[Stops]:
        kept: list[Stops] = []
        first = 0
        for length in rows.lengths:
            states = {}
            for stop in stops(rows.start, rows.start + length):
                state = extended.new_zeros(self.taps, extended.shape[1])
                known = min(self.taps - 1, stop)
                end = first + stop - rows.start + self.taps - 1  # in the extended rows
                places = self._places(stop, known, extended.device)
                states[stop] = (state.index_copy_(0, places, extended[end - known : end]),)
            kept.append(states)
            first += length
        return kept
