"""Concurrent operations on many objects, with a bound.

The simulation runs coroutines without an event loop: there they run one after another, in a fixed order.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

_AT_ONCE_MAX = 32
K = TypeVar("K")
V = TypeVar("V")


async def each(keys: Iterable[K], read: Callable[[K], Awaitable[V]]) -> list[V]:
    """The result of `read` for each key, in the order of the keys."""
    if not _has_loop():
        return [await read(key) for key in keys]
    slots = asyncio.Semaphore(_AT_ONCE_MAX)

    async def read_one(key: K) -> V:
        async with slots:
            return await read(key)

    return list(await asyncio.gather(*(read_one(key) for key in keys)))


async def off_loop(compute: Callable[[K], V], value: K) -> V:
    """`compute(value)` in a thread, so that slow work does not block the event loop."""
    return await asyncio.to_thread(compute, value) if _has_loop() else compute(value)


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
