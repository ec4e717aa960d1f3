"""Rank 0: says what every rank does next, and computes a lane as the others do.

A pass is spread by micro-batches: each rank has a lane, and all gather a part of the weights, compute with it and give
it back, part by part. What a request's micro-batches gave is added in their order, whichever rank was done first, so
that a gradient's bits depend neither on the number of ranks nor on arrival. The ranks take turns with whatever else
rank 0 computes (samples, optimizer steps): they wait for its next command.

P parameters of an adapter.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from knapper.engine.executor import Work
from knapper.engine.models.base import Model
from knapper.engine.out_of_memory import MemoryShortage
from knapper.engine.ranks import messages
from knapper.engine.ranks.group import NONE, Command, Group, Kind
from knapper.engine.ranks.messages import Lane, LaneRequest, LaneResult, RequestResult
from knapper.engine.ranks.shards import Shards
from knapper.engine.training import batch
from knapper.engine.training.batch import MicroBatch, PendingRequest
from knapper.engine.training.trainer import RunState
from knapper.errors import UserError

Opened = tuple[RunState, PendingRequest]


class Bound(Protocol):
    """What ranks are waited for under (`followers.Watch`)."""

    def waits(self) -> AbstractContextManager[None]:
        """It bounds the time, and ends the process if a rank is gone."""
        ...

    def close(self) -> None: ...


class Leader:
    def __init__(self, group: Group, shards: Shards, bound: Bound) -> None:
        self.group, self.shards = group, shards
        self._bound, self._waits = bound, bound.waits
        self._whole: set[int] = set()
        self._under_way: set[int] = set()

    @property
    def lanes(self) -> int:
        return self.group.size

    @contextmanager
    def gather(self, part: int, step: int) -> Iterator[None]:
        """knapper.engine.layers.layerwise.Gather, for rank 0 alone: samples."""
        with self._gathered(Kind.GATHER, part, step):
            yield

    @contextmanager
    def _gathered(self, kind: Kind, part: int, step: int) -> Iterator[None]:
        if part not in self.shards or part in self._whole:  # the last norm; the head within the head's own part
            yield
            return
        with self._waits():
            self._begin(kind, part, self.shards.behind(part, step))
            self.shards.wait(part)
        self._whole.add(part)
        try:
            yield
        finally:
            self._whole.remove(part)
            self.shards.release(part)

    def _begin(self, kind: Kind, part: int, ahead: int) -> None:
        gathers = part not in self._under_way
        if ahead in self._under_way or ahead in self._whole:
            ahead = NONE
        self.group.command(Command(kind, part, gathers, ahead))
        if gathers:
            self.shards.begin(part)
        if ahead != NONE:
            self.shards.begin(ahead)
        self._under_way = self._under_way - {part} | ({ahead} - {NONE})

    def compute(self, model: Model, lanes: Sequence[Sequence[Opened]]) -> Work[None]:
        """`batch.compute` of several lanes, the first of which is rank 0's. A request may be in several of them.

        Raises MemoryShortage if a rank lacked memory: the pass may be computed again.
        """
        own = [request for _, request in lanes[0]]
        others = [_Sent.of(lane, own) for lane in lanes[1:]]
        try:
            with self._waits():
                self._open(others)
            yield from batch.compute(model, own, partial(self._gathered, Kind.RUN))
            with self._waits():
                results = self._collected(others)
        except BaseException:
            with self._waits():
                self.group.command(Command(Kind.DROP))
            raise
        _expect_computed(results)

    def _open(self, others: Sequence["_Sent"]) -> None:
        self.group.command(Command(Kind.LANE))
        for rank in range(1, self.group.size):
            lane = others[rank - 1] if rank <= len(others) else _Sent(())
            self.group.send(rank, messages.encode(lane.message()))
            for state, _, _ in lane.requests:
                self.group.send_tensor(rank, state.weights_P)

    def _collected(self, others: Sequence["_Sent"]) -> list[LaneResult]:
        """The lanes' results, added to their requests in the order of the lanes."""
        self.group.command(Command(Kind.COLLECT))
        results: list[LaneResult] = []
        for rank, lane in enumerate(others, 1):
            results.append(messages.decode_result(self.group.receive(rank)))
            for (_, request, _), result in zip(lane.requests, results[-1].requests, strict=False):
                sums_P = None
                if result.error is None and request.sums_P is not None:
                    sums_P = self.group.receive_tensor(rank, torch.empty_like(request.sums_P))
                _add(request, result, sums_P)
        return results

    def close(self) -> None:
        """Let the others end."""
        self._bound.close()
        self.group.command(Command(Kind.END))


@dataclass(frozen=True)
class _Sent:
    """What another rank computes."""

    requests: Sequence[tuple[RunState, PendingRequest, MicroBatch]]

    @classmethod
    def of(cls, lane: Sequence[Opened], own: Sequence[PendingRequest]) -> "_Sent":
        """The next micro-batch of each, behind the one that rank 0 will take."""
        requests = []
        for state, request in lane:
            place = 1 if any(request is each for each in own) else 0
            requests.append((state, request, request.waiting[place]))
            del request.waiting[place]
        return cls(requests)

    def message(self) -> Lane:
        return Lane([LaneRequest.of(state.spec, request, batch) for state, request, batch in self.requests])


def _add(request: PendingRequest, result: RequestResult, sums_P: Tensor | None) -> None:
    """A micro-batch's part of its request. Behind an earlier one's error it counts for nothing."""
    if request.error is not None:
        return
    if result.error is not None:
        request.error = UserError(result.error)
        return
    request.outputs += [{name: array.array() for name, array in output.items()} for output in result.outputs]
    request.datum_metrics += result.metrics
    if request.sums_P is not None and sums_P is not None:
        request.sums_P.add_(sums_P)


def _expect_computed(results: Sequence[LaneResult]) -> None:
    for rank, result in enumerate(results, 1):
        if result.defect:
            raise RuntimeError(f"rank {rank}: {result.defect}")
    if any(result.lacked_memory for result in results):
        raise MemoryShortage(None)
