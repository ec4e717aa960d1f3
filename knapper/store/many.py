"""Many objects at once, a few at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

_AT_ONCE_MAX = 32
K = TypeVar("K")
V = TypeVar("V")


async def each(keys: Iterable[K], read: Callable[[K], Awaitable[V]]) -> list[V]:
    """What `read` returns for each key, in the order of the keys."""
    gate = asyncio.Semaphore(_AT_ONCE_MAX)

    async def one(key: K) -> V:
        async with gate:
            return await read(key)

    return list(await asyncio.gather(*(one(key) for key in keys)))
