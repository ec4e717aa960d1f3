"""The texts that decode, those that are parked, and the room that they have. For the device's thread only."""

from collections.abc import Hashable
from typing import Any, Final

from knapper.engine.models.base import DecodeState
from knapper.engine.sampling.prompts import SamplingCounters
from knapper.engine.sampling.sequence import Isolation, RunningSequence, SequenceGroup

_REGAINED: Final = 8  # a text that ends gives back 1 / so much of its positions of the room that parking took


class DecodeBatch:
    """`cache` has what those keep that decode. They reserve positions, `positions_max` at most.

    After memory ran out there is room for no more than then decoded, until texts end or none is left.
    """

    def __init__(self, cache: DecodeState[Any], positions_max: int, counters: SamplingCounters) -> None:
        self.texts: dict[Hashable, RunningSequence] = {}  # by their slots of the cache
        self.parked: list[RunningSequence] = []  # they have begun, and keep nothing but their tokens; the oldest first
        self._cache, self._positions_max, self._counters = cache, positions_max, counters
        self._room = positions_max

    @property
    def jobs(self) -> list[SequenceGroup]:
        """Of the texts that decode, each once."""
        return list(dict.fromkeys(text.job for text in self.texts.values()))

    def free(self) -> int:
        """Positions that may be reserved."""
        if not self.texts:
            self._room = self._positions_max
        return self._room - self._reserved()

    def seat(self, text: RunningSequence, kept: Any) -> None:
        """The text decodes, from `kept`: what its tokens but the last one left."""
        self.texts[self._cache.add(kept, text.length)] = text
        text.job.company = min(text.job.company, Isolation.OWN_PASSES)

    def leave(self) -> None:
        """Texts that ended, or whose job did, give back what they have."""
        for slot, text in list(self.texts.items()):
            if text.finished:
                del self.texts[slot]
                self._cache.remove(slot)
                self._room = min(self._positions_max, self._room + text.job.cost // _REGAINED)

    def restore(self) -> None:
        """After a step that broke: all texts are as their tokens say. Who lost what it kept is parked."""
        for slot, text in list(self.texts.items()):
            if not text.finished and not self._cache.restored(slot, text.length):
                self._park(slot)
        self.leave()

    def park_all(self) -> None:
        for slot in list(self.texts):
            self._park(slot)

    def park_younger_half(self) -> None:
        """Nothing takes their room before another text has ended."""
        slots = sorted(self.texts, key=lambda slot: self.texts[slot].age)
        for slot in slots[len(slots) // 2 :]:
            self._park(slot)
        self._room = self._reserved()

    def wait(self, text: RunningSequence) -> None:
        """A text that has tokens, and no slot, is parked."""
        self._counters.parked += 1
        self.parked = sorted([*self.parked, text], key=lambda one: one.age)

    def drop(self, job: SequenceGroup) -> None:
        """Its texts leave at once."""
        for slot in [slot for slot, text in self.texts.items() if text.job is job]:
            del self.texts[slot]
            self._cache.remove(slot)
        self.parked = [text for text in self.parked if text.job is not job]

    def _park(self, slot: Hashable) -> None:
        self.wait(self.texts.pop(slot))
        self._cache.remove(slot)

    def _reserved(self) -> int:
        return sum(text.job.cost for text in self.texts.values())
