"""Prompts that were computed a moment ago: the next one that begins like one of them goes on from there.

So the samples of a group may come as requests of one each, and a conversation computes each turn once. What is kept is
exactly what computing it again would give (on a CPU to the last bit), so that it decides nothing but the time.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_Tokens = NDArray[np.int32]

COMMON_MIN: Final = 32  # tokens: shorter beginnings are computed again, which costs less than to look after them
_COST_MIN: Final = 64  # that an entry counts for: short prompts are not free either


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """What a prompt of an adapter left. `last_1H`: its last row."""

    adapter: str
    tokens_T: _Tokens
    past: Any
    last_1H: Tensor

    @property
    def cost(self) -> int:
        return max(_COST_MIN, len(self.tokens_T))


class PrefixCache:
    """At most `tokens_max` tokens of prompts, those that were of use last. What an adapter's name holds never changes.

    `partial`: a prompt may go on from a part of an earlier one; False: it must be the same one.
    """

    def __init__(self, tokens_max: int, *, partial: bool) -> None:
        self.tokens = 0  # that all of them count for
        self._tokens_max, self._partial = tokens_max, partial
        self._entries: OrderedDict[tuple[str, bytes], CachedPrompt] = OrderedDict()  # the last used last
        self._by_start: dict[tuple[str, bytes], list[CachedPrompt]] = {}  # by their first COMMON_MIN tokens

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapter: str, tokens_T: _Tokens, tokens_limit: int) -> tuple[CachedPrompt, int] | None:
        """The one that has most in common with the prompt, and how many tokens of it, `tokens_limit` at most.

        All tokens only if it is the same prompt: then its last row is too.
        """
        exact = self._entries.get(_key(adapter, tokens_T))
        if exact is not None and tokens_limit >= len(tokens_T):
            return self._used(exact), len(tokens_T)
        best: CachedPrompt | None = None
        shared = COMMON_MIN - 1
        for entry in self._by_start.get(_start(adapter, tokens_T), ()) if self._partial else ():
            length = min(_common(entry.tokens_T, tokens_T), tokens_limit, len(tokens_T) - 1)
            if length > shared:
                best, shared = entry, length
        return None if best is None else (self._used(best), shared)

    def add(self, adapter: str, tokens_T: _Tokens, past: Any, last_1H: Tensor) -> None:
        """Remember a prompt, in place of those that it begins with."""
        entry = CachedPrompt(adapter, tokens_T, past, last_1H)
        if entry.cost > self._tokens_max:
            return
        for other in list(self._by_start.get(_start(adapter, tokens_T), ())):
            if self._partial and _common(other.tokens_T, tokens_T) == len(other.tokens_T):
                self._remove(other)
        if (exact := self._entries.get(_key(adapter, tokens_T))) is not None:
            self._remove(exact)
        self.trim(self._tokens_max - entry.cost)
        self._entries[_key(adapter, tokens_T)] = entry
        self._by_start.setdefault(_start(adapter, tokens_T), []).append(entry)
        self.tokens += entry.cost

    def trim(self, tokens_max: int) -> None:
        """Forget what was not used for longest, down to so many tokens."""
        while self.tokens > max(0, tokens_max):
            self._remove(next(iter(self._entries.values())))

    def _used(self, entry: CachedPrompt) -> CachedPrompt:
        self._entries.move_to_end(_key(entry.adapter, entry.tokens_T))
        return entry

    def _remove(self, entry: CachedPrompt) -> None:
        del self._entries[_key(entry.adapter, entry.tokens_T)]
        alternatives = self._by_start[_start(entry.adapter, entry.tokens_T)]
        alternatives.remove(entry)
        if not alternatives:
            del self._by_start[_start(entry.adapter, entry.tokens_T)]
        self.tokens -= entry.cost


def _key(adapter: str, tokens_T: _Tokens) -> tuple[str, bytes]:
    return adapter, tokens_T.tobytes()


def _start(adapter: str, tokens_T: _Tokens) -> tuple[str, bytes]:
    return adapter, tokens_T[:COMMON_MIN].tobytes()


def _common(first_T: _Tokens, second_T: _Tokens) -> int:
    """How many tokens two prompts begin alike with."""
    shorter = min(len(first_T), len(second_T))
    differing = np.flatnonzero(first_T[:shorter] != second_T[:shorter])
    return int(differing[0]) if len(differing) else shorter
