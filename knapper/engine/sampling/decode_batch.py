"""The texts that decode, those that are parked, and the room that they have. For the device's thread only."""

from collections.abc import Hashable
from typing import Any, Final

from knapper.engine.models.base import Texts
from knapper.engine.sampling.prompts import Counters
from knapper.engine.sampling.sequence import Company, Job, Text

_REGAINED: Final = 8  # a text that ends gives back 1 / so much of its positions of the room that parking took


class Active:
    """`cache` has what those keep that decode. They reserve positions, `positions_max` at most.

    After memory ran out there is room for no more than then decoded, until texts end or none is left.
    """

    def __init__(self, cache: Texts[Any], positions_max: int, counters: Counters) -> None:
        self.texts: dict[Hashable, Text] = {}  # by their slots of the cache
        self.parked: list[Text] = []  # they have begun, and keep nothing but their tokens; the oldest first
        self._cache, self._positions_max, self._counters = cache, positions_max, counters
        self._room = positions_max

    @property
    def jobs(self) -> list[Job]:
        """Of the texts that decode, each once."""
        return list(dict.fromkeys(text.job for text in self.texts.values()))

    def free(self) -> int:
        """Positions that may be reserved."""
        if not self.texts:
            self._room = self._positions_max
        return self._room - self._reserved()

    def seat(self, text: Text, kept: Any) -> None:
        """The text decodes, from `kept`: what its tokens but the last one left."""
        self.texts[self._cache.add(kept, text.length)] = text
        text.job.company = min(text.job.company, Company.OWN_PASSES)

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

    def wait(self, text: Text) -> None:
        """A text that has tokens, and no slot, is parked."""
        self._counters.parked += 1
        self.parked = sorted([*self.parked, text], key=lambda one: one.age)

    def drop(self, job: Job) -> None:
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
