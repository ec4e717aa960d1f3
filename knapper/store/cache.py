"""Values that never change, read once and kept while there is room."""

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_REMEMBERED_MAX = 16384
K = TypeVar("K")
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """The most recently used values."""

    def __init__(self) -> None:
        self._values: OrderedDict[K, V] = OrderedDict()

    async def get(self, key: K, load: Callable[[], Awaitable[V]]) -> V:
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        value = await load()
        self.keep(key, value)
        return value

    def known(self, key: K) -> V | None:
        """The value if it is in memory."""
        if key in self._values:
            self._values.move_to_end(key)
        return self._values.get(key)

    def known_keys(self) -> list[K]:
        return list(self._values)

    def keep(self, key: K, value: V) -> None:
        """Remember the value, in the place of any other."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > _REMEMBERED_MAX:
            self._values.popitem(last=False)

    def forget(self, key: K) -> None:
        """Read it anew the next time."""
        self._values.pop(key, None)
