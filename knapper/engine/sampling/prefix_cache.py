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
_tokens_least: Final = 64  # that an entry counts for: short prompts are not free either


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a prompt of an adapter left. `last_1H`: its last row."""

    adapter: str
    tokens_T: _Tokens
    kept: Any
    last_1H: Tensor

    @property
    def cost(self) -> int:
        return max(_tokens_least, len(self.tokens_T))


class PrefixCache:
    """At most `tokens_max` tokens of prompts, those that were of use last. What an adapter's name holds never changes.

    `partly`: a prompt may go on from a part of an earlier one; False: it must be the same one.
    """

    def __init__(self, tokens_max: int, *, partly: bool) -> None:
        self.tokens = 0  # that all of them count for
        self._tokens_max, self._partly = tokens_max, partly
        self._entries: OrderedDict[tuple[str, bytes], Beginning] = OrderedDict()  # the last used last
        self._alike: dict[tuple[str, bytes], list[Beginning]] = {}  # by their first COMMON_MIN tokens

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapter: str, tokens_T: _Tokens, most: int) -> tuple[Beginning, int] | None:
        """The one that has most in common with the prompt, and how many tokens of it, `most` at most.

        All tokens only if it is the same prompt: then its last row is too.
        """
        same = self._entries.get(_key(adapter, tokens_T))
        if same is not None and most >= len(tokens_T):
            return self._used(same), len(tokens_T)
        found: Beginning | None = None
        common = COMMON_MIN - 1
        for one in self._alike.get(_start(adapter, tokens_T), ()) if self._partly else ():
            length = min(_common(one.tokens_T, tokens_T), most, len(tokens_T) - 1)
            if length > common:
                found, common = one, length
        return None if found is None else (self._used(found), common)

    def add(self, adapter: str, tokens_T: _Tokens, kept: Any, last_1H: Tensor) -> None:
        """Remember a prompt, in place of those that it begins with."""
        one = Beginning(adapter, tokens_T, kept, last_1H)
        if one.cost > self._tokens_max:
            return
        for other in list(self._alike.get(_start(adapter, tokens_T), ())):
            if self._partly and _common(other.tokens_T, tokens_T) == len(other.tokens_T):
                self._remove(other)
        if (same := self._entries.get(_key(adapter, tokens_T))) is not None:
            self._remove(same)
        self.trim(self._tokens_max - one.cost)
        self._entries[_key(adapter, tokens_T)] = one
        self._alike.setdefault(_start(adapter, tokens_T), []).append(one)
        self.tokens += one.cost

    def trim(self, tokens_max: int) -> None:
        """Forget what was not used for longest, down to so many tokens."""
        while self.tokens > max(0, tokens_max):
            self._remove(next(iter(self._entries.values())))

    def _used(self, one: Beginning) -> Beginning:
        self._entries.move_to_end(_key(one.adapter, one.tokens_T))
        return one

    def _remove(self, one: Beginning) -> None:
        del self._entries[_key(one.adapter, one.tokens_T)]
        alike = self._alike[_start(one.adapter, one.tokens_T)]
        alike.remove(one)
        if not alike:
            del self._alike[_start(one.adapter, one.tokens_T)]
        self.tokens -= one.cost


def _key(adapter: str, tokens_T: _Tokens) -> tuple[str, bytes]:
    return adapter, tokens_T.tobytes()


def _start(adapter: str, tokens_T: _Tokens) -> tuple[str, bytes]:
    return adapter, tokens_T[:COMMON_MIN].tobytes()


def _common(first_T: _Tokens, second_T: _Tokens) -> int:
    """How many tokens two prompts begin alike with."""
    shorter = min(len(first_T), len(second_T))
    differing = np.flatnonzero(first_T[:shorter] != second_T[:shorter])
    return int(differing[0]) if len(differing) else shorter
