"""What a gateway does by itself, again and again, each piece at its own pace. Nothing that goes wrong once ends it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import structlog

from knapper.errors import KnapperError

_FAILED_S = 5.0  # what fails is not tried again sooner

log = structlog.get_logger()


@dataclass(frozen=True)
class Chore:
    """`work`, again and again, `every_s` after it ended. `at_once`: the first time as the gateway starts."""

    name: str
    work: Callable[[], Awaitable[object]]
    every_s: float
    at_once: bool = False


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
        await asyncio.sleep(pause_s)
        pause_s = chore.every_s if await _went_well(chore) else max(chore.every_s, _FAILED_S)


async def _went_well(chore: Chore) -> bool:
    """The work, once. A border of the process: whatever escapes from it is logged here."""
    try:
        await chore.work()
    except KnapperError as error:
        log.warning(f"{chore.name} failed", code=error.code, reason=str(error))
        return False
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise  # we are told to end; else something else was cancelled, and the work waited for it
        log.exception(f"{chore.name}: defect")
        return False
    except Exception:
        log.exception(f"{chore.name}: defect")
        return False
    return True
