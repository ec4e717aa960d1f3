"""Schedules training: batches forward_backward requests of many runs into passes of the one base model.

One task on the device serves all runs, as the sampler's does. It yields after every layer of a pass, so that sampling
and optimizer steps get their turns. A pass never waits for requests: those that arrive meanwhile share the next one.
Fair by rows (`FairShare`): the least served run goes first, and others fill the pass. A request that cannot share a
pass never waits for one that could.
"""

import itertools
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from knapper.concurrency.fair_share import FairShare
from knapper.engine import hardware
from knapper.engine.executor import Executor, Work, timed
from knapper.engine.out_of_memory import MemoryShortage, as_shortage
from knapper.engine.training.batch import MicroBatch, PendingRequest
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import UserError
from knapper.wire.types import ForwardBackward, ForwardBackwardOutput

TrainingResult = tuple[RunState, ForwardBackwardOutput, float]

_SHARES_REMEMBERED: Final = 1024  # micro-batches that `shares` looks back on


@dataclass
class TrainingCounters:
    """Since the scheduler started."""

    passes: int = 0
    rows: int = 0  # computed rows of all passes
    capacity: int = 0  # rows that the passes could hold: rows / capacity is how full they were
    shares: int = 0  # micro-batches: shares / passes is the mean number of runs in a pass
    repeated: int = 0  # requests that were computed again alone, after a pass failed or lacked memory


@dataclass(eq=False)
class _Request:
    state: RunState
    read: Callable[[], ForwardBackward]
    arrived_s: float
    future: "Future[TrainingResult]" = field(default_factory=Future)
    opened: PendingRequest | None = None
    alone: bool = False  # a pass with it failed
    spared: bool = False  # it lacked memory and is repeated after all caches were released
    cost_s: float = 0.0

    @property
    def run(self) -> str:
        return self.state.spec.run

    @property
    def batches(self) -> Sequence[MicroBatch]:
        """Those that are still to be computed, in order."""
        assert self.opened is not None
        return self.opened.waiting


@dataclass(frozen=True)
class _Share:
    """A request's micro-batch in a pass."""

    request: _Request
    rows: int


_Lane = list[_Share]


def _may_share(first: _Request, other: _Request) -> bool:
    assert first.opened is not None
    assert other.opened is not None
    if first is other:
        return True
    return not (first.alone or other.alone) and first.opened.differentiates == other.opened.differentiates


class TrainingScheduler:
    """Passes on one device. `now` in seconds only measures costs and waiting times."""

    def __init__(self, trainer: Trainer, device: Executor, now: Callable[[], float]) -> None:
        self.counters = TrainingCounters()
        self.computing = False  # whether a pass is under way; of the device's thread
        self._trainer, self._device, self._now = trainer, device, now
        # Shared by callers and the device's thread, under the lock.
        self._lock = threading.Lock()
        self._arrivals: list[_Request] = []
        self._working = False
        self._recent: deque[tuple[str, int]] = deque(maxlen=_SHARES_REMEMBERED)  # (run, rows)
        # Used by the device's thread only.
        self._requests: list[_Request] = []
        self._shares = FairShare()  # in rows, by run

    @property
    def waiting(self) -> int:
        """Unfinished requests."""
        return len(self._arrivals) + len(self._requests)

    def oldest_s(self) -> float:
        """Age of the oldest waiting request in seconds; 0 if none waits."""
        now_s = self._now()
        with self._lock:
            return max((now_s - request.arrived_s for request in [*self._arrivals, *self._requests]), default=0.0)

    def shares(self, count: int) -> list[float]:
        """The parts of the recently computed rows of the `count` most served runs, the largest first."""
        rows: dict[str, int] = {}
        with self._lock:
            for run, run_rows in self._recent:
                rows[run] = rows.get(run, 0) + run_rows
        total = sum(rows.values())
        return [run_rows / total for run_rows in sorted(rows.values(), reverse=True)[:count]]

    def submit(self, state: RunState, read: Callable[[], ForwardBackward]) -> "Future[TrainingResult]":
        """(state, output, seconds of the passes that were this request's), as `Trainer.forward_backward` returns them.

        The bits do not depend on the requests that share the passes. `read` is called on the device's thread; its
        errors are raised. Cancelling the future ends the request after its micro-batch.
        """
        request = _Request(state, read, self._now())
        with self._lock:
            self._arrivals.append(request)
            begins, self._working = not self._working, True
        if begins:
            self._device.submit(self._work(), "passes")
        return request.future

    # The rest runs on the device's thread.

    def _work(self) -> Work[None]:
        try:
            while self._take_arrivals():
                if chosen := self._choose():
                    yield from self._compute(chosen)
        except BaseException as error:
            self._abandon(error)
            raise

    def _take_arrivals(self) -> bool:
        """Accept arrivals and drop cancelled requests. False when none is left: the task then ends."""
        with self._lock:
            arrived, self._arrivals = self._arrivals, []
            self._requests = [request for request in self._requests + arrived if not request.future.cancelled()]
            self._working = bool(self._requests)
        for request in arrived:
            self._shares.join(request.run)
        self._shares.leave((request.run,) for request in self._requests)
        for request in list(self._requests):
            if request.opened is None:
                self._open(request)
        return self._working

    def _open(self, request: _Request) -> None:
        """Allocate its gradients; after a memory shortage it is opened again at the next look."""
        try:
            request.opened = self._trainer.open(request.state, request.read())
        except BaseException as error:  # noqa: BLE001  the border of the thread: the waiting caller gets it
            failure = as_shortage(error)
        else:
            return
        self._isolate([request], failure)

    def _choose(self) -> list[_Lane]:
        """The micro-batches of the next pass, by lane; of a request each lane has one at most, in the order of lanes.

        A run that is a whole pass ahead of one that is left out does not fill up: that would cost the other run time.
        """
        lanes: list[_Lane] = []
        while len(lanes) < self._trainer.lanes and (lane := self._choose_lane(lanes)):
            lanes.append(lane)
        return lanes

    def _choose_lane(self, before: Sequence[_Lane]) -> _Lane:
        """The requests of one more lane: the least served, and others that fit beside it. Empty if none is left."""
        rows_max, rows_shared = self._trainer.rows_max, self._rows_of_lane()
        taken = Counter(id(share.request) for lane in before for share in lane)
        rows_taken: Counter[str] = Counter()
        for share in itertools.chain(*before):
            rows_taken[share.request.run] += share.rows

        def served(request: _Request) -> float:
            (rows,) = self._shares.rank(request.run)
            return rows + rows_taken[request.run]

        waiting = [
            request
            for request in self._requests
            if request.opened is not None and taken[id(request)] < len(request.batches)
        ]
        waiting.sort(key=served)
        first = before[0][0].request if before else None
        chosen: _Lane = []
        rows, bound = 0, math.inf
        for request in waiting:
            more = request.batches[taken[id(request)]].rows
            if not before and not chosen:
                self._shares.serve(request.run)
                first = request
            assert first is not None
            fits = not chosen or (served(request) <= bound and rows + more <= rows_shared)
            if fits and _may_share(first, request):
                chosen.append(_Share(request, more))
                rows += more
            else:
                bound = min(bound, served(request) + rows_max)
        return chosen

    def _rows_of_lane(self) -> int:
        """Up to which a lane takes more requests: of several lanes none should be empty while another is full."""
        shared, lanes = self._trainer.rows_shared(len(self._requests)), self._trainer.lanes
        if lanes == 1:
            return shared
        opened = [request for request in self._requests if request.opened is not None]
        rows = sum(batch.rows for request in opened for batch in itertools.islice(request.batches, lanes))
        return min(shared, -(-rows // lanes))

    def _compute(self, lanes: Sequence[_Lane]) -> Work[None]:
        capacity = len(lanes) * self._trainer.rows_shared(len(self._requests))
        shares = list(itertools.chain(*lanes))
        opened = [[(share.request.state, share.request.opened) for share in lane if share.request.opened is not None]
                  for lane in lanes]  # fmt: skip
        self.computing = True
        try:
            _, spent_s = yield from timed(self._trainer.compute(opened), self._now)
        except Exception as error:  # noqa: BLE001  a defect that one request brings out must not fail the others
            failure = as_shortage(error)
        else:
            self._computed(shares, spent_s, capacity)
            return
        finally:
            self.computing = False
        del opened  # frees gradients that are half added, and perhaps the memory that was lacking
        self._isolate(_requests_of(shares), failure)

    def _computed(self, shares: Sequence[_Share], spent_s: float, capacity: int) -> None:
        """Account a finished pass."""
        total = sum(share.rows for share in shares)
        self.counters.passes += 1
        self.counters.shares += len(shares)
        self.counters.rows += total
        self.counters.capacity += max(capacity, total)
        with self._lock:
            self._recent.extend((share.request.run, share.rows) for share in shares)
        for share in shares:
            share.request.cost_s += spent_s * share.rows / total
            self._shares.charge(share.rows, share.request.run)
        for request in _requests_of(shares):
            if request.opened is not None and request.opened.done:
                self._finish(request, request.opened)

    def _isolate(self, chosen: Sequence[_Request], failure: BaseException) -> None:
        """After a failed pass, perhaps with gradients half added: start each of its requests anew, alone.

        A request that lacked memory alone is repeated once more after all caches are released.
        """
        device = self._trainer.decoder.device
        for request in chosen:
            request.alone, request.opened = True, None
        if isinstance(failure, MemoryShortage):
            hardware.release(device)
        for request in chosen:
            if len(chosen) > 1 or (isinstance(failure, MemoryShortage) and not request.spared):
                self.counters.repeated += 1
                request.spared = len(chosen) == 1
            elif isinstance(failure, MemoryShortage):
                todo = "Send shorter datums or fewer of them in a request, or train an adapter of a lower rank"
                self._answer(request, failure.error(f"a training pass of {request.run}", device, todo))
            else:
                self._answer(request, failure)

    def _finish(self, request: _Request, opened: PendingRequest) -> None:
        try:
            state, output = self._trainer.close(request.state, opened)
        except UserError as error:
            self._answer(request, error)
            return
        except Exception as error:  # noqa: BLE001  as above
            failure = as_shortage(error)
        else:
            self._answer(request, (state, output, request.cost_s))
            return
        self._isolate([request], failure)

    def _answer(self, request: _Request, result: TrainingResult | BaseException) -> None:
        self._requests.remove(request)
        if request.future.set_running_or_notify_cancel():
            if isinstance(result, BaseException):
                request.future.set_exception(result)
            else:
                request.future.set_result(result)

    def _abandon(self, error: BaseException) -> None:
        """Fail every request: the device closes, or an error that no single request caused."""
        with self._lock:
            requests = self._requests + self._arrivals
            self._requests, self._arrivals, self._working = [], [], False
        for request in requests:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(error)


def _requests_of(shares: Sequence[_Share]) -> list[_Request]:
    """Each once, in the order of the shares."""
    return list({id(share.request): share.request for share in shares}.values())
