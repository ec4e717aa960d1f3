"""The results of a claim on their way into the store: in order, one commit at a time, beside further operations.

Nothing is published before its commit is stored. While one is being stored, later results gather for the next. A commit
that could not be stored stays, byte for byte, and is tried again before anything else.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final, Generic

from knapper import limits
from knapper.concurrency.tasks import Spawn, Task
from knapper.errors import Fenced
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.machine import State
from knapper.state.journal.own_objects import OwnObjects
from knapper.state.journal.records import Commit, Result, encode
from knapper.state.journal.replay import Replay

_AHEAD_MAX: Final = 8  # results in memory that are not durable: more would shorten no step, and lose more work

Publish = Callable[[int, Commit], Awaitable[None]]


@dataclass(frozen=True)
class Point(Generic[State]):
    """A run after operation `applied`. `replay`: of all operations up to it, since the claim."""

    applied: int
    state: State | None
    replay: Replay


@dataclass(frozen=True)
class _Storing(Generic[State]):
    """A commit that is being stored as record `n`, or could not be. `after`: the run once it is durable."""

    n: int
    commit: Commit
    data: bytes
    after: Point[State]


class Outbox(Generic[State]):
    """The results of one claim, whose newest record is its fence: `durable` is the run after that."""

    def __init__(
        self,
        run: RunId,
        epoch: int,
        fence: int,
        durable: Point[State],
        objects: OwnObjects,
        clock: Callable[[], float],
        spawn: Spawn,
    ) -> None:
        self.out = fence  # the newest record known to be stored
        self.durable = durable  # the run after it; `replay`: with the commits
        self.records = Replay()  # of all commits so far
        self._run, self._epoch = run, epoch
        self._objects, self._clock, self._spawn = objects, clock, spawn
        self._publish: Publish = _nobody
        self._results: list[Result] = []  # for the next commit
        self._device_s = 0.0  # of those
        self._after = durable  # the run after those
        self._due = False  # whether they wait for nothing but the commit before them
        self._storing: _Storing[State] | None = None
        self._task: Task[None] | None = None
        self._running = False
        self._error: Exception | None = None  # why the commit could not be stored

    async def open(self, publish: Publish) -> None:
        """Begin a slice: store what an earlier one could not. `publish` is called with each commit that is durable."""
        self._publish, self._error = publish, None
        await self.drain()

    def close(self) -> None:
        """End the slice: nobody is told any more."""
        self._publish = _nobody

    @property
    def states(self) -> list[State]:
        """The run's states that are kept: that which is durable, that of the commit under way, and the newest."""
        points = [self.durable, self._after, *([] if self._storing is None else [self._storing.after])]
        return [point.state for point in points if point.state is not None]

    @property
    def ahead(self) -> int:
        """How many results are not durable yet."""
        return len(self._results) + (len(self._storing.commit.results) if self._storing is not None else 0)

    def add(self, result: Result, device_s: float, after: Point[State]) -> None:
        """Put the result of the next operation in. `after`: the run after it."""
        self._results.append(result)
        self._device_s += device_s
        self._after = after

    def commit(self) -> None:
        """Begin to store all that waits, now or after the commit under way."""
        self._due = bool(self._results)
        self._store_next()

    async def has_room(self) -> bool:
        """Wait until another operation may be applied. False if a commit cannot be stored; `drain` then raises why."""
        while self._error is None and self._is_full():
            await self._commit_one()
        return self._error is None

    async def drain(self) -> None:
        """Return once every result is durable. Raises Fenced, or StoreError: it stays, and `open` tries it again."""
        while self._error is None and self.ahead:
            await self._commit_one()
        if self._error is not None:
            raise self._error

    def _is_full(self) -> bool:
        waiting_bytes = sum(len(result.body) for result in self._results)
        return self.ahead >= _AHEAD_MAX or waiting_bytes >= limits.commit_inline_bytes_max

    async def _commit_one(self) -> None:
        self.commit()
        if self._task is not None:
            await self._task

    def _store_next(self) -> None:
        if self._running or self._error is not None:
            return
        if self._storing is None and self._due and self._results:
            self._storing = self._cut()
        if self._storing is not None:
            self._running = True
            self._task = self._spawn(self._store(self._storing))

    def _cut(self) -> _Storing[State]:
        """All that waits, as the next commit."""
        commit = Commit(epoch=self._epoch, results=self._results, committed_at=self._clock(), device_s=self._device_s)
        data = encode(commit)
        self._results, self._device_s, self._due = [], 0.0, False
        self.records = self.records.grown(record_bytes=len(data))
        after = replace(self._after, replay=self._after.replay.plus(self.records))
        return _Storing(self.out + 1, commit, data, after)

    async def _store(self, storing: _Storing[State]) -> None:
        try:
            if await self._objects.create(layout.commit(self._run, storing.n), storing.data) is not None:
                # After our own fence only a later claim can take this slot, or a copy of this process.
                raise Fenced(f"slot {storing.n} of {self._run} was taken by another claim")
            self.out, self.durable, self._storing = storing.n, storing.after, None
            await self._publish(storing.n, storing.commit)
        except Exception as error:  # noqa: BLE001  raised again by `drain`, where the slice waits for it
            self._error = error
        finally:
            self._running = False
        self._store_next()


async def _nobody(_n: int, _commit: Commit) -> None:
    return None
