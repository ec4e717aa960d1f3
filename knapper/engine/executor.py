"""One thread computes. Work comes as generators.

Each `yield` is a place where other work may go first, so nobody waits long. Owners share the device evenly by time
(`FairShare`): training and sampling have half of it each while both have work, however long their steps are.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from knapper.concurrency.fair_share import FairShare

T = TypeVar("T")
Work = Generator[None, None, T]
Now = Callable[[], float]


@dataclass(frozen=True, eq=False)
class _Turn(Generic[T]):
    task: Work[T]
    future: Future[T]
    owner: str


class Executor:
    """Runs tasks in turns, one step each, on one thread of its own.

    No task needs a lock, and no two compute at once.
    """

    def __init__(
        self,
        name: str = "device",
        now: Now = time.monotonic,  # noqa: TID251  what turns take is measured, and decides only whose turn is next
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        """`synchronize` waits until what a turn began is done, on hardware that computes while its thread goes on: called
        when others wait, so that each is charged its own."""
        self.busy_s = 0.0  # that turns took
        self._now, self._synchronize = now, synchronize
        self._arrivals: queue.SimpleQueue[_Turn[Any] | None] = queue.SimpleQueue()
        self._shares = FairShare()  # in seconds, by owner
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, task: Work[T], owner: str = "") -> T:
        """What the task returns or raises. If the caller is cancelled, the task is closed at its next yield."""
        return await asyncio.wrap_future(self.submit(task, owner))

    def submit(self, task: Work[T], owner: str = "") -> Future[T]:
        """`owner` time it takes: tasks of one owner take turns within its share."""
        future: Future[T] = Future()
        self._arrivals.put(_Turn(task, future, owner))
        return future

    def close(self) -> None:
        """End the thread after the step under way; what is not finished then is cancelled."""
        self._arrivals.put(None)
        self._thread.join()

    def _work(self) -> None:
        ready: list[_Turn[Any]] = []  # who had a turn goes to the end
        while True:
            arrived = None
            while not ready or not self._arrivals.empty():
                arrived = self._arrivals.get()
                if arrived is None:
                    for turn in ready:
                        turn.task.close()
                        turn.future.cancel()
                    return
                self._shares.join(arrived.owner)
                ready.append(arrived)
            turn = min(ready, key=lambda turn: self._shares.rank(turn.owner))
            ready.remove(turn)
            if self._charged(turn, alone=not ready):
                ready.append(turn)
            else:
                self._shares.leave((turn.owner,) for turn in ready)
            del turn, arrived  # while it waits, the thread must not keep the last result: a run's whole state

    def _charged(self, turn: _Turn[Any], *, alone: bool) -> bool:
        """A step, on its owner's account. True if the task has more to do."""
        self._shares.serve(turn.owner)
        began = self._now()
        more = self._step(turn.task, turn.future)
        if not alone:
            self._synchronize()
        took_s = self._now() - began
        self.busy_s += took_s
        self._shares.charge(took_s, turn.owner)
        return more

    @staticmethod
    def _step(task: Work[Any], future: Future[Any]) -> bool:
        """True if the task has more to do."""
        if future.cancelled():
            task.close()
            return False
        try:
            next(task)
            return True
        except StopIteration as stop:
            result, error = stop.value, None
        except BaseException as raised:  # noqa: BLE001  the border of the thread: the waiting caller gets it
            result, error = None, raised
        if future.set_running_or_notify_cancel():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)
        return False


def timed(task: Work[T], now: Now) -> Work[tuple[T, float]]:
    """(what the task returns, the seconds that its own pieces took: not those of its neighbours)."""
    spent_s = 0.0
    try:
        while True:
            started = now()
            try:
                next(task)
            except StopIteration as stop:
                return stop.value, spent_s + now() - started
            spent_s += now() - started
            yield
    finally:
        task.close()
