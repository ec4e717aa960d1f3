"""The cost of replaying a run since its newest snapshot, and when that calls for another snapshot."""

from dataclasses import dataclass, replace
from typing import Final

from knapper import limits

_STORING_S: Final = 2.0  # the assumed duration of the first snapshot
_RECORD_BYTES_MIN: Final = 4096  # charged for a record at least: small ones are not free to store and to read


@dataclass(frozen=True)
class Replay:
    """`cost_s`: compute seconds of the operations. `bytes`: of their records. `loaded`: the newest load."""

    cost_s: float = 0.0
    bytes: int = 0
    loaded: int = -1

    def grown(self, cost_s: float = 0.0, record_bytes: int | None = None, loaded: int = -1) -> "Replay":
        """With one more operation, or one more record of this size."""
        size = 0 if record_bytes is None else max(record_bytes, _RECORD_BYTES_MIN)
        return Replay(self.cost_s + cost_s, self.bytes + size, max(self.loaded, loaded))

    def plus(self, other: "Replay") -> "Replay":
        """Both."""
        return Replay(self.cost_s + other.cost_s, self.bytes + other.bytes, max(self.loaded, other.loaded))

    def without(self, stored: "Replay") -> "Replay":
        """What remains after a snapshot that was taken when the replay was `stored`."""
        return replace(self, cost_s=self.cost_s - stored.cost_s, bytes=self.bytes - stored.bytes)


@dataclass
class SnapshotBudget:
    """When to take a snapshot. `serialized_bytes`: the size of the run's state."""

    storing_s: float = _STORING_S  # the duration of the newest snapshot

    def is_used_up(self, replay: Replay, snapshot_seq: int) -> bool:
        """Whether a snapshot must come before the next operation, so that no recovery replays more than the budget.

        A loaded checkpoint calls for one as well: its owner may delete it, and then no replay could load it.
        """
        return replay.loaded > snapshot_seq or replay.cost_s > limits.replay_budget_s

    def is_nearly_used_up(self, replay: Replay, snapshot_seq: int, serialized_bytes: int) -> bool:
        """Whether a background snapshot should start now, so that it ends before the budget is used up.

        Later, operations would wait for it; earlier, there would only be more of them. It is also due when the records
        to replay are larger than the snapshot, which bounds the journal of a run with many small operations.
        """
        ahead_s = min(2 * self.storing_s, limits.replay_budget_s / 2)
        bytes_max = max(limits.replay_bytes_min, serialized_bytes)
        late = replay.cost_s > limits.replay_budget_s - ahead_s or replay.bytes > bytes_max
        return late or self.is_used_up(replay, snapshot_seq)

    def is_worth_one(self, replay: Replay, snapshot_seq: int, serialized_bytes: int) -> bool:
        """Whether to snapshot a run that leaves memory: its replay would cost more than storing its bytes."""
        worth_s = max(limits.snapshot_replay_s_min, serialized_bytes / limits.snapshot_bytes_per_replay_s)
        worth = replay.cost_s > min(worth_s, limits.replay_budget_s / 2)
        return worth or self.is_used_up(replay, snapshot_seq)
