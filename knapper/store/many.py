"""Many objects at once, a few at a time.

A simulation that plays coroutines by hand has no event loop: there, everything happens in turn, and in the same order
for ever.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

_AT_ONCE_MAX = 32
K = TypeVar("K")
V = TypeVar("V")


async def each(keys: Iterable[K], read: Callable[[K], Awaitable[V]]) -> list[V]:
    """What `read` returns for each key, in the order of the keys."""
    if not _has_loop():
        return [await read(key) for key in keys]
    gate = asyncio.Semaphore(_AT_ONCE_MAX)

    async def one(key: K) -> V:
        async with gate:
            return await read(key)

    return list(await asyncio.gather(*(one(key) for key in keys)))


async def off_loop(compute: Callable[[K], V], value: K) -> V:
    """`compute(value)` in a thread: what takes long must not hold up everything else."""
    return await asyncio.to_thread(compute, value) if _has_loop() else compute(value)


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
