"""Work that goes on beside its starter: an asyncio task, or in the simulation another coroutine of one process."""

import asyncio
from collections.abc import Coroutine, Generator
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
