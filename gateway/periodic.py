"""What a gateway does by itself, again and again, each piece at its own pace. Nothing that goes wrong once ends it.

Where nothing happens, a piece that finds nothing to do is done ever less often, so that idling costs next to nothing;
whatever makes work for it stirs it. Nothing depends on that: what stirred nobody is found at the end of the pause.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import structlog

from knapper.errors import KnapperError

_FAILED_S = 5.0  # what fails is not tried again sooner

log = structlog.get_logger()


@dataclass(frozen=True)
class Chore:
    """`work`, again and again. `at_once`: the first time as the gateway starts.

    It answers how long the pause after it may become: the next one is twice as long as the one before it, `every_s` at
    least. None: it is `every_s`. Once `stirred`, it is done within `every_s`.
    """

    name: str
    work: Callable[[], Awaitable[float | None]]
    every_s: float
    at_once: bool = False
    stirred: asyncio.Event = field(default_factory=asyncio.Event)


@asynccontextmanager
async def done(chores: Iterable[Chore]) -> AsyncIterator[None]:
    """They are done for as long as this is open; one in the middle of its work is cancelled at the end."""
    tasks = [asyncio.create_task(_for_ever(chore), name=chore.name) for chore in chores]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _for_ever(chore: Chore) -> None:
    pause_s = 0.0 if chore.at_once else chore.every_s
    while True:
        pause_s = await _work(chore, await _paused(chore, pause_s))


async def _paused(chore: Chore, pause_s: float) -> float:
    """How long at most, so that the next pause is not longer than it should be for what was stirred."""
    last_s = min(pause_s, chore.every_s)
    if pause_s > last_s:
        with suppress(TimeoutError):
            await asyncio.wait_for(chore.stirred.wait(), pause_s - last_s)
            pause_s = last_s
    chore.stirred.clear()  # what stirs from here on, while the work perhaps has looked already, is for the next time
    await asyncio.sleep(last_s)
    return pause_s


async def _work(chore: Chore, pause_s: float) -> float:
    """The work, once; then the next pause. A border of the process: whatever escapes from the work is logged here."""
    try:
        longest_s = await chore.work() or 0.0
        return max(chore.every_s, min(2 * pause_s, longest_s))
    except KnapperError as error:
        log.warning(f"{chore.name} failed", code=error.code, reason=str(error))
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise  # we are told to end; else something else was cancelled, and the work waited for it
        log.exception(f"{chore.name}: defect")
    except Exception:
        log.exception(f"{chore.name}: defect")
    return max(chore.every_s, _FAILED_S)
