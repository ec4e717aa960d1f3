"""The sequences that decode, those that are parked, and their memory budget. For the device's thread only."""

from collections.abc import Callable, Hashable
from typing import Any, Final

from knapper.engine.models.base import DecodeState
from knapper.engine.sampling.prompts import SamplingCounters
from knapper.engine.sampling.sequence import Isolation, RunningSequence, SequenceGroup

GROWTH: Final = 256  # tokens that a sequence may grow by, from its start on, before it can lack memory
_REGAINED: Final = 8  # a finished sequence restores 1 / this of its positions to the budget that parking cut


class DecodeBatch:
    """Sequences with a slot of `cache`, which takes `positions_max` positions at most.

    A sequence starts where it and all others can grow by `GROWTH` tokens, or to their ends. When they have, and the
    next token of all does not fit, some are parked. So a parked sequence is computed again once in so many steps.

    After a memory shortage the budget is what then decoded; it grows as sequences finish, and is whole when none is
    left.
    """

    def __init__(self, cache: DecodeState[Any], positions_max: int, counters: SamplingCounters) -> None:
        self.sequences: dict[Hashable, RunningSequence] = {}  # by slot of the cache
        self.parked: list[RunningSequence] = []  # started, with nothing but their tokens; the oldest first
        self._cache, self._positions_max, self._counters = cache, positions_max, counters
        self._budget = positions_max

    @property
    def groups(self) -> list[SequenceGroup]:
        """The requests of the sequences that decode."""
        return list(dict.fromkeys(sequence.group for sequence in self.sequences.values()))

    def free(self) -> int:
        """Positions for sequences that start or resume."""
        if not self.sequences:
            self._budget = self._positions_max
        return self._budget - self._needed(GROWTH)

    def cost(self, group: SequenceGroup, length: int) -> int:
        """Positions that a sequence of `length` tokens needs to start or resume."""
        return self._cache.positions(min(length + GROWTH, group.length_max))

    def make_room(self, served: Callable[[str], float]) -> int:
        """Park sequences until one more token of each fits: of the tenant that has had the most, the youngest.

        Returns the positions that are left.
        """
        while (left := self._budget - self._needed(1)) < 0 and len(self.sequences) > 1:
            self._park_slot(
                max(self.sequences, key=lambda slot: (served(self.sequences[slot].group.request.tenant),
                                                      self.sequences[slot].age))
            )  # fmt: skip
        return left

    def add(self, sequence: RunningSequence, past: Any) -> None:
        """Give the sequence a slot. `past`: keys and values of its tokens but the last."""
        self.sequences[self._cache.add(past, sequence.length)] = sequence
        sequence.group.isolation = min(sequence.group.isolation, Isolation.OWN_PASSES)

    def remove_finished(self) -> None:
        """Free the slots of finished sequences and of finished requests."""
        for slot, sequence in list(self.sequences.items()):
            if sequence.finished:
                del self.sequences[slot]
                self._cache.remove(slot)
                regained = self._cache.positions(sequence.length) // _REGAINED
                self._budget = min(self._positions_max, self._budget + regained)

    def restore(self) -> None:
        """After a failed step: roll every sequence back to its tokens; park those that lost keys and values."""
        for slot, sequence in list(self.sequences.items()):
            if not sequence.finished and not self._cache.roll_back(slot, sequence.length):
                self._park_slot(slot)
        self.remove_finished()

    def park_all(self) -> None:
        for slot in list(self.sequences):
            self._park_slot(slot)

    def park_younger_half(self) -> None:
        """Their capacity stays unused until another sequence finishes."""
        slots = sorted(self.sequences, key=lambda slot: self.sequences[slot].age)
        for slot in slots[len(slots) // 2 :]:
            self._park_slot(slot)
        self._budget = self._needed(GROWTH)

    def park(self, sequence: RunningSequence) -> None:
        """Park a sequence that has tokens and no slot."""
        self._counters.parked += 1
        self.parked = sorted([*self.parked, sequence], key=lambda waiting: waiting.age)

    def drop(self, group: SequenceGroup) -> None:
        """Remove the request's sequences."""
        for slot in [slot for slot, sequence in self.sequences.items() if sequence.group is group]:
            del self.sequences[slot]
            self._cache.remove(slot)
        self.parked = [sequence for sequence in self.parked if sequence.group is not group]

    def _park_slot(self, slot: Hashable) -> None:
        self.park(self.sequences.pop(slot))
        self._cache.remove(slot)

    def _needed(self, growth: int) -> int:
        """Positions of all when each has grown by so many tokens, or to its end."""
        return sum(
            self._cache.positions(min(sequence.length + growth, sequence.group.length_max))
            for sequence in self.sequences.values()
        )
