"""One thread computes. Work comes as generators.

Each `yield` is a place where other work may go first, so nobody waits long.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Task = Generator[None, None, T]


class Device:
    """Runs tasks in turns, one step each, on one thread of its own.

    No task needs a lock, and no two compute at once.
    """

    def __init__(self, name: str = "device") -> None:
        self._arrivals: queue.SimpleQueue[tuple[Task[Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def run(self, task: Task[T]) -> T:
        """What the task returns or raises. If the caller is cancelled, the task is closed at its next yield."""
        return await asyncio.wrap_future(self.submit(task))

    def submit(self, task: Task[T]) -> Future[T]:
        future: Future[T] = Future()
        self._arrivals.put((task, future))
        return future

    def close(self) -> None:
        """End the thread after the step under way; what is not finished then is cancelled."""
        self._arrivals.put(None)
        self._thread.join()

    def _work(self) -> None:
        ready: deque[tuple[Task[Any], Future[Any]]] = deque()
        while True:
            arrival = None
            while not ready or not self._arrivals.empty():
                arrival = self._arrivals.get()
                if arrival is None:
                    for task, future in ready:
                        task.close()
                        future.cancel()
                    return
                ready.append(arrival)
            turn = ready.popleft()
            if self._step(*turn):
                ready.append(turn)
            del turn, arrival  # while it waits, the thread must not keep the last result: a run's whole state

    @staticmethod
    def _step(task: Task[Any], future: Future[Any]) -> bool:
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
