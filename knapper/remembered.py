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
        value = self._values[key] = await load()
        if len(self._values) > _REMEMBERED_MAX:
            self._values.popitem(last=False)
        return value
