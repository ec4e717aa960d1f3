"""Values in memory: the most recently used ones; what takes long is loaded once, however many ask for it."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Generic, TypeVar

from cachetools import LRUCache

_VALUES_MAX = 16384
K = TypeVar("K")
V = TypeVar("V")


class LruCache(Generic[K, V]):
    """At most `size_max`, summed over the values; without a `size`, each counts for one.

    A value that is larger by itself is not kept.
    """

    def __init__(self, size_max: int = _VALUES_MAX, size: Callable[[V], int] = lambda _: 1) -> None:
        self._values: LRUCache[K, V] = LRUCache(size_max, size)
        self._size = size
        self._loading: dict[K, asyncio.Future[V]] = {}

    async def get(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """The value, loaded by each who asks while it is not there. Needs no event loop: the simulation has none."""
        if key in self._values:
            return self._values[key]
        value = await load()
        self.keep(key, value)
        return value

    async def get_once(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        """The value, with a single `load` under way, which goes on when the first of its callers leaves.

        Raises what `load` does, and keeps nothing then.
        """
        if key in self._values:
            return self._values[key]
        if (loading := self._loading.get(key)) is None:
            loading = self._loading[key] = asyncio.ensure_future(load())
            loading.add_done_callback(partial(self._loaded, key))
        return await asyncio.shield(loading)

    def _loaded(self, key: K, loading: asyncio.Future[V]) -> None:
        failed = loading.cancelled() or loading.exception() is not None
        if self._loading.get(key) is loading:  # else it was forgotten, or replaced, while it was under way
            del self._loading[key]
            if not failed:
                self.keep(key, loading.result())

    @property
    def size(self) -> float:
        """Of all values together."""
        return self._values.currsize

    def known(self, key: K) -> V | None:
        """The value if it is in memory."""
        return self._values.get(key)

    def known_keys(self) -> list[K]:
        return list(self._values)

    def keep(self, key: K, value: V) -> None:
        """Remember the value, in the place of any other."""
        self.forget(key)
        if self._size(value) <= self._values.maxsize:
            self._values[key] = value

    def forget(self, key: K) -> None:
        """Load it anew the next time."""
        self._values.pop(key, None)
        self._loading.pop(key, None)
