"""An LRU cache with single-flight loading."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from cachetools import LRUCache

_VALUES_MAX = 16384
K = TypeVar("K")
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """The most recently used values, of at most `size_max` together; without `size`, each value counts 1.

    A value larger than `size_max` is not kept.
    """

    def __init__(self, size_max: int = _VALUES_MAX, size: Callable[[V], int] = lambda _: 1) -> None:
        self._values: LRUCache[K, V] = LRUCache(size_max, size)
        self._size = size
        self._loading: dict[K, asyncio.Future[V]] = {}

    async def get(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """The value; concurrent callers may each load it. Needs no event loop: the simulation has none."""
        if key in self._values:
            return self._values[key]
        value = await load()
        self.keep(key, value)
        return value

    async def get_once(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """The value, loaded once for all concurrent callers; cancelling one of them does not stop the load.

        Raises the error of `load`, which is not cached.
        """
        if key in self._values:
            return self._values[key]
        if (loading := self._loading.get(key)) is None:
            loading = self._loading[key] = asyncio.ensure_future(load())
            loading.add_done_callback(partial(self._loaded, key))
        return await asyncio.shield(loading)

    def _loaded(self, key: K, loading: asyncio.Future[V]) -> None:
        failed = loading.cancelled() or loading.exception() is not None
        if self._loading.get(key) is loading:  # else the key was forgotten or replaced meanwhile
            del self._loading[key]
            if not failed:
                self.keep(key, loading.result())

    @property
    def size(self) -> float:
        """The size of all values together."""
        return self._values.currsize

    def known(self, key: K) -> V | None:
        """The value if it is cached."""
        return self._values.get(key)

    def known_keys(self) -> list[K]:
        return list(self._values)

    def keep(self, key: K, value: V) -> None:
        """Cache the value, replacing any other."""
        self.forget(key)
        if self._size(value) <= self._values.maxsize:
            self._values[key] = value

    def forget(self, key: K) -> None:
        """Drop the value; the next `get` loads it."""
        self._values.pop(key, None)
        self._loading.pop(key, None)
