"""Periodic tasks of the gateway, each at its own pace. A failure is logged, and the task continues.

A task that finds nothing to do runs ever less often, so that idling costs next to nothing; a doorbell brings the next
run forward. Nothing depends on the doorbell: without one, the work is found at the end of the pause.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import structlog

from knapper.errors import KnapperError

_FAILED_S = 5.0  # the shortest pause after a failure

log = structlog.get_logger()


@dataclass(frozen=True)
class PeriodicTask:
    """Runs `work` again and again. `at_once`: for the first time as the gateway starts.

    `work` returns an upper bound for the next pause in seconds: pauses start at `every_s` and double up to it. None:
    the pause is `every_s`. Once `doorbell` is set, `work` runs within `every_s`.
    """

    name: str
    work: Callable[[], Awaitable[float | None]]
    every_s: float
    at_once: bool = False
    doorbell: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def running(tasks: Iterable[PeriodicTask]) -> AsyncIterator[None]:
    """Runs the tasks while this context is open; its end cancels them."""
    loops = [asyncio.create_task(_run_for_ever(task), name=task.name) for task in tasks]
    try:
        yield
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


async def _run_for_ever(task: PeriodicTask) -> None:
    pause_s = 0.0 if task.at_once else task.every_s
    while True:
        pause_s = await _run_once(task, await _pause(task, pause_s))


async def _pause(task: PeriodicTask, pause_s: float) -> float:
    """Pause for `pause_s`, or less once the doorbell rings. Returns the pause from which the next one doubles."""
    last_s = min(pause_s, task.every_s)
    if pause_s > last_s:
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s - last_s):  # wait_for of Python 3.11 loses a cancellation beside a ring
                await task.doorbell.wait()
            pause_s = last_s
    task.doorbell.clear()  # from here on it counts for the next run: this one may have looked already
    await asyncio.sleep(last_s)
    return pause_s


async def _run_once(task: PeriodicTask, pause_s: float) -> float:
    """Run the work once; returns the next pause. The outermost handler: it logs every exception of the work."""
    try:
        pause_max_s = await task.work() or 0.0
        return max(task.every_s, min(2 * pause_s, pause_max_s))
    except KnapperError as error:
        log.warning(f"{task.name} failed", code=error.code, reason=str(error))
    except asyncio.CancelledError:
        if (current := asyncio.current_task()) is not None and current.cancelling():
            raise  # the gateway stops; else the work awaited a task that was cancelled
        log.exception(f"{task.name}: defect")
    except Exception:
        log.exception(f"{task.name}: defect")
    return max(task.every_s, _FAILED_S)
