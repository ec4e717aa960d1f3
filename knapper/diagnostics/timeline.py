"""When a run worked and when it stood still, and when its weights changed, as this gateway saw it."""

from collections import OrderedDict, deque
from typing import Final

from knapper.state.journal.records import Kind

_OPERATIONS_MAX: Final = 256
_UPDATES_MAX: Final = 4096
UPDATES: Final[frozenset[Kind]] = frozenset({"optim_step", "load_weights"})  # they change the weights


class Timeline:
    """Times in monotonic seconds. `known_from`: the first operation since which none was missed."""

    def __init__(self) -> None:
        self.known_from = -1
        self._operations: OrderedDict[int, tuple[float, float]] = OrderedDict()  # seq -> (accepted, applied)
        self._updates: deque[tuple[int, float]] = deque(maxlen=_UPDATES_MAX)  # (seq, applied)

    def accept(self, seq: int, now: float) -> None:
        self._operations.setdefault(seq, (now, float("inf")))
        while len(self._operations) > _OPERATIONS_MAX:
            self._operations.popitem(last=False)

    def apply(self, seq: int, kind: Kind, now: float) -> None:
        """The operation succeeded."""
        if self.known_from < 0:
            self.known_from = seq
        self._operations[seq] = (self._operations.get(seq, (now, now))[0], now)
        if kind in UPDATES:
            self._updates.append((seq, now))

    def miss(self, seq: int) -> None:
        """Nothing is known of operation `seq`, nor of those before it."""
        self.known_from = seq + 1
        self._updates.clear()

    def stood_still(self, began: float, ended: float) -> bool:
        """Whether no operation waited or was computed in this time."""
        return not any(accepted < ended and applied > began for accepted, applied in self._operations.values())

    def updates_since(self, seq: int, until: float = float("inf"), before: int | None = None) -> int | None:
        """How often the weights changed after operation `seq`: until a time, or before an operation. None: unknown."""
        if self.known_from < 0 or seq < self.known_from - 1:
            return None
        if len(self._updates) == _UPDATES_MAX and self._updates[0][0] > seq:
            return None
        return sum(n > seq and at <= until and (before is None or n < before) for n, at in self._updates)
