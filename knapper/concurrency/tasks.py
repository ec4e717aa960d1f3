"""Work that goes on beside its starter: an asyncio task, or in the simulation another coroutine of one process."""

import asyncio
from collections.abc import Coroutine, Generator, Iterable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Task(Protocol[T_co]):
    """Awaited, it gives what the work returns, or raises what it raises."""

    def __await__(self) -> Generator[Any, Any, T_co]: ...


class Spawn(Protocol):
    """Starts work. Keep the task: asyncio itself holds it weakly."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> Task[T]: ...


def spawn(work: Coroutine[Any, Any, T], /) -> Task[T]:
    """As a task of the running event loop."""
    return asyncio.create_task(work)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results, in order. If one fails, or the caller leaves, the others end before this does."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            if not task.cancelling():  # a second time would cut short how it cleans up
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
