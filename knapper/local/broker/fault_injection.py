"""Fault injection, within a broker's guarantees: events come twice, late, in another order, or not at all."""

import random
from dataclasses import dataclass, field
from typing import Final

COPIES_MAX: Final = 5
DROPPED: Final = 0.2
LATE_S_MAX: Final = 0.5


@dataclass
class FaultInjection:
    """For each delivery: the number of copies and their delays, all determined by the seed."""

    seed: int
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def copies(self) -> list[float]:
        """Delays in seconds of 1 to 5 copies, or none."""
        if self._random.random() < DROPPED:
            return []
        return [self._random.uniform(0, LATE_S_MAX) for _ in range(self._random.randint(1, COPIES_MAX))]
