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
        self.sequences: dict[Hashable, RunningSequence] = {}  # by their slots of the cache
        self.parked: list[RunningSequence] = []  # they have begun, and keep nothing but their tokens; the oldest first
        self._cache, self._positions_max, self._counters = cache, positions_max, counters
        self._budget = positions_max

    @property
    def groups(self) -> list[SequenceGroup]:
        """Of the texts that decode, each once."""
        return list(dict.fromkeys(sequence.group for sequence in self.sequences.values()))

    def free(self) -> int:
        """Positions that may be reserved."""
        if not self.sequences:
            self._budget = self._positions_max
        return self._budget - self._reserved()

    def add(self, sequence: RunningSequence, past: Any) -> None:
        """The text decodes, from `past`: what its tokens but the last one left."""
        self.sequences[self._cache.add(past, sequence.length)] = sequence
        sequence.group.isolation = min(sequence.group.isolation, Isolation.OWN_PASSES)

    def remove_finished(self) -> None:
        """Texts that ended, or whose job did, give back what they have."""
        for slot, sequence in list(self.sequences.items()):
            if sequence.finished:
                del self.sequences[slot]
                self._cache.remove(slot)
                self._budget = min(self._positions_max, self._budget + sequence.group.cost // _REGAINED)

    def restore(self) -> None:
        """After a step that broke: all texts are as their tokens say. Who lost what it kept is parked."""
        for slot, sequence in list(self.sequences.items()):
            if not sequence.finished and not self._cache.restored(slot, sequence.length):
                self._park_slot(slot)
        self.remove_finished()

    def park_all(self) -> None:
        for slot in list(self.sequences):
            self._park_slot(slot)

    def park_younger_half(self) -> None:
        """Nothing takes their room before another text has ended."""
        slots = sorted(self.sequences, key=lambda slot: self.sequences[slot].age)
        for slot in slots[len(slots) // 2 :]:
            self._park_slot(slot)
        self._budget = self._reserved()

    def park(self, sequence: RunningSequence) -> None:
        """A text that has tokens, and no slot, is parked."""
        self._counters.parked += 1
        self.parked = sorted([*self.parked, sequence], key=lambda waiting: waiting.age)

    def drop(self, group: SequenceGroup) -> None:
        """Its texts leave at once."""
        for slot in [slot for slot, sequence in self.sequences.items() if sequence.group is group]:
            del self.sequences[slot]
            self._cache.remove(slot)
        self.parked = [sequence for sequence in self.parked if sequence.group is not group]

    def _park_slot(self, slot: Hashable) -> None:
        self.park(self.sequences.pop(slot))
        self._cache.remove(slot)

    def _reserved(self) -> int:
        return sum(sequence.group.cost for sequence in self.sequences.values())
