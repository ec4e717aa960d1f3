"""Prefix cache: a prompt that begins like a recent one reuses its keys and values, and the states of recurrent layers.

So the samples of a group may come as requests of one each, and a conversation computes each turn once. Cached values
equal recomputed ones (on a CPU to the last bit), so that the cache changes nothing but time. Prompts of equal token ids
with different images share what stands before the first difference.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.images import placed
from knapper.engine.images.placed import PlacedImage

_Tokens = NDArray[np.int32]

COMMON_MIN: Final = 32  # tokens: recomputing a shorter prefix costs less than keeping it
_COST_MIN: Final = 64  # tokens that an entry counts for at least: short prompts have a cost too


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """A computed prompt of an adapter. `last_1H`: its last row. `positions`: what `past` takes of the memory."""

    adapter: str
    tokens_T: _Tokens
    past: Any
    last_1H: Tensor
    positions: int
    images: Sequence[PlacedImage] = ()

    @property
    def cost(self) -> int:
        return max(_COST_MIN, self.positions)


class PrefixCache:
    """At most `tokens_max` tokens of prompts, least recently used evicted first. An adapter's content never changes.

    `reusable`: how many of so many common tokens a prompt may reuse of an earlier one's past, if it is another prompt.
    """

    def __init__(self, tokens_max: int, reusable: Callable[[Any, int], int]) -> None:
        self.tokens = 0  # the sum of the entries' costs
        self._tokens_max, self._reusable = tokens_max, reusable
        self._entries: OrderedDict[_Key, CachedPrompt] = OrderedDict()  # least recently used first
        self._by_start: dict[tuple[str, bytes], list[CachedPrompt]] = {}  # by their first COMMON_MIN tokens

    def __len__(self) -> int:
        return len(self._entries)

    def find(
        self, adapter: str, tokens_T: _Tokens, tokens_limit: int, images: Sequence[PlacedImage] = ()
    ) -> tuple[CachedPrompt, int] | None:
        """The entry with the longest common prefix, and its length in tokens, `tokens_limit` at most.

        All tokens only for the same prompt: then its last row is valid too.
        """
        exact = self._entries.get(_key(adapter, tokens_T, images))
        if exact is not None and tokens_limit >= len(tokens_T):
            return self._used(exact), len(tokens_T)
        best: CachedPrompt | None = None
        shared = COMMON_MIN - 1
        for entry in self._by_start.get(_start(adapter, tokens_T), ()):
            equal = placed.common(entry.images, images, _common(entry.tokens_T, tokens_T))
            common = min(equal, tokens_limit, len(tokens_T) - 1)
            length = self._reusable(entry.past, placed.begun(images, common))
            if length > shared:
                best, shared = entry, length
        return None if best is None else (self._used(best), shared)

    def add(
        self,
        adapter: str,
        tokens_T: _Tokens,
        past: Any,
        last_1H: Tensor,
        positions: int,
        images: Sequence[PlacedImage] = (),
    ) -> None:
        """Add a prompt; it replaces entries that are a prefix of it, and of no use beside it."""
        entry = CachedPrompt(adapter, tokens_T, past, last_1H, positions, images)
        key = _key(adapter, tokens_T, images)
        if entry.cost > self._tokens_max:
            return
        for other in list(self._by_start.get(_start(adapter, tokens_T), ())):
            whole = len(other.tokens_T)
            equal = placed.common(other.images, images, _common(other.tokens_T, tokens_T))
            if equal == whole == self._reusable(past, whole):
                self._remove(other)
        if (exact := self._entries.get(key)) is not None:
            self._remove(exact)
        self.trim(self._tokens_max - entry.cost)
        self._entries[key] = entry
        self._by_start.setdefault(_start(adapter, tokens_T), []).append(entry)
        self.tokens += entry.cost

    def trim(self, tokens_max: int) -> None:
        """Evict the least recently used down to `tokens_max` tokens."""
        while self.tokens > max(0, tokens_max):
            self._remove(next(iter(self._entries.values())))

    def _used(self, entry: CachedPrompt) -> CachedPrompt:
        self._entries.move_to_end(_key(entry.adapter, entry.tokens_T, entry.images))
        return entry

    def _remove(self, entry: CachedPrompt) -> None:
        del self._entries[_key(entry.adapter, entry.tokens_T, entry.images)]
        alternatives = self._by_start[_start(entry.adapter, entry.tokens_T)]
        alternatives.remove(entry)
        if not alternatives:
            del self._by_start[_start(entry.adapter, entry.tokens_T)]
        self.tokens -= entry.cost


_Key = tuple[str, bytes, bytes]


def _key(adapter: str, tokens_T: _Tokens, images: Sequence[PlacedImage]) -> _Key:
    return adapter, tokens_T.tobytes(), placed.digest(images)


def _start(adapter: str, tokens_T: _Tokens) -> tuple[str, bytes]:
    return adapter, tokens_T[:COMMON_MIN].tobytes()


def _common(first_T: _Tokens, second_T: _Tokens) -> int:
    """Length of the common prefix in tokens."""
    shorter = min(len(first_T), len(second_T))
    differing = np.flatnonzero(first_T[:shorter] != second_T[:shorter])
    return int(differing[0]) if len(differing) else shorter
