"""One thread computes. Work is a generator.

Other work may go first at each `yield`, so no task waits long. Owners share the device evenly by time (`FairShare`):
training and sampling have half of it each while both have work, however long their steps are.
"""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from knapper.concurrency.fair_share import FairShare

T = TypeVar("T")
IDLE_S: Final = 5.0  # longer than a client waits between its steps
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
        now: Now = time.monotonic,  # noqa: TID251  measures turns, and decides only which comes next
        synchronize: Callable[[], None] = lambda: None,
        idle: Callable[[], None] = lambda: None,
        idle_s: float = IDLE_S,
    ) -> None:
        """`synchronize` waits for the work that a turn queued, on hardware that computes beside its thread. Called when
        other tasks wait, so that each owner is charged its own time. `idle`: called on the thread, once, when nothing
        has come for `idle_s`.
        """
        self.busy_s = 0.0  # seconds of all turns
        self._now, self._synchronize = now, synchronize
        self._idle, self._idle_s = idle, idle_s
        self._arrivals: queue.SimpleQueue[_Turn[Any] | None] = queue.SimpleQueue()
        self._shares = FairShare()  # in seconds, by owner
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, task: Work[T], owner: str = "") -> T:
        """The task's result or error. If the caller is cancelled, the task is closed at its next yield."""
        return await asyncio.wrap_future(self.submit(task, owner))

    def submit(self, task: Work[T], owner: str = "") -> Future[T]:
        """Charges the task's time to `owner`: tasks of one owner take turns within its share."""
        future: Future[T] = Future()
        self._arrivals.put(_Turn(task, future, owner))
        return future

    def close(self) -> None:
        """End the thread after the current step and cancel unfinished tasks."""
        self._arrivals.put(None)
        self._thread.join()

    def _work(self) -> None:
        ready: list[_Turn[Any]] = []  # a task goes to the end after its turn
        while True:
            arrived = None
            while not ready or not self._arrivals.empty():
                arrived = self._arrived()
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
            del turn, arrived  # else the waiting thread would keep the last result: a run's whole state

    def _arrived(self) -> "_Turn[Any] | None":
        try:
            return self._arrivals.get(timeout=self._idle_s)
        except queue.Empty:
            self._idle()
        return self._arrivals.get()

    def _charged(self, turn: _Turn[Any], *, alone: bool) -> bool:
        """Run a step and charge its owner. True if the task has more steps."""
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
        """True if the task has more steps."""
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
    """(the task's result, the seconds of its own steps without those of other tasks)."""
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
