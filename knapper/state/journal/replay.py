"""What a recovery of a run would have to repeat since its newest snapshot, and when that calls for another snapshot."""

from dataclasses import dataclass, replace
from typing import Final

from knapper import limits

_STORING_S: Final = 2.0  # what a snapshot takes, before one was taken
_RECORD_BYTES_MIN: Final = 4096  # what a record takes at least where it lies, and to be read: small ones are not free


@dataclass(frozen=True)
class Replay:
    """`cost_s`: compute of the operations. `bytes`: of their records. `loaded`: the newest that loaded a checkpoint."""

    cost_s: float = 0.0
    bytes: int = 0
    loaded: int = -1

    def grown(self, cost_s: float = 0.0, record_bytes: int | None = None, loaded: int = -1) -> "Replay":
        """With one more operation, or one more record of so many bytes."""
        size = 0 if record_bytes is None else max(record_bytes, _RECORD_BYTES_MIN)
        return Replay(self.cost_s + cost_s, self.bytes + size, max(self.loaded, loaded))

    def without(self, stored: "Replay") -> "Replay":
        """What a snapshot leaves of it that was taken when it was `stored`."""
        return replace(self, cost_s=self.cost_s - stored.cost_s, bytes=self.bytes - stored.bytes)


@dataclass
class SnapshotBudget:
    """When a run is stored as a whole. `frozen_bytes`: the size of its state."""

    storing_s: float = _STORING_S  # how long the newest snapshot took to store

    def is_used_up(self, replay: Replay, snapshot_seq: int) -> bool:
        """Whether nothing more is applied before a snapshot: a recovery may not have to repeat more than the budget.

        Nor may it depend for longer than it has to on a checkpoint that was loaded: its owner may delete that.
        """
        return replay.loaded > snapshot_seq or replay.cost_s > limits.replay_budget_s

    def is_nearly_used_up(self, replay: Replay, snapshot_seq: int, frozen_bytes: int) -> bool:
        """Whether the budget is used up by about the time that a snapshot in the background will have taken.

        Begun then, no operation waits for it; begun sooner, it would only be more often. Or a recovery has more to read
        in records than a snapshot is large: that bounds what a run of many small operations leaves.
        """
        ahead_s = min(2 * self.storing_s, limits.replay_budget_s / 2)
        bytes_max = max(limits.replay_bytes_min, frozen_bytes)
        late = replay.cost_s > limits.replay_budget_s - ahead_s or replay.bytes > bytes_max
        return late or self.is_used_up(replay, snapshot_seq)

    def is_worth_one(self, replay: Replay, snapshot_seq: int, frozen_bytes: int) -> bool:
        """Whether a run that leaves the memory should be stored: its replay costs more than its bytes do."""
        worth_s = max(limits.snapshot_replay_s_min, frozen_bytes / limits.snapshot_bytes_per_replay_s)
        worth = replay.cost_s > min(worth_s, limits.replay_budget_s / 2)
        return worth or self.is_used_up(replay, snapshot_seq)
