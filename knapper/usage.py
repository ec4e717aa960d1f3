"""What a tenant has used: tokens trained, read from the journal, and checkpoints saved, read from their records.

Nothing is counted while requests are served. The journal knows a week for certain, and every run since its second
newest snapshot; tokens of samples are in no journal.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

from knapper import limits
from knapper.checkpoints import Checkpoint
from knapper.errors import InvalidField, UserError
from knapper.ids import RunId
from knapper.journal import history
from knapper.journal.records import Operation
from knapper.store import Store
from knapper.wire import proto, zstd

_HOUR_S = 3600


@dataclass(frozen=True)
class Window:
    """[first, end) in hours since the epoch."""

    first: int
    end: int

    def hour(self, at: float) -> int | None:
        """The hour of a time, or None outside the window."""
        hour = int(at // _HOUR_S)
        return hour if self.first <= hour < self.end else None


def begin_of(hour: int) -> datetime:
    return datetime.fromtimestamp(hour * _HOUR_S, UTC)


async def tokens_trained(store: Store, runs: list[RunId], window: Window) -> dict[tuple[int, RunId], int]:
    """Tokens of the accepted forward_backward requests (forward alone too), by hour and run.

    Raises InvalidField if too much happened in the window to be counted at once.
    """
    counted: Counter[tuple[int, RunId]] = Counter()
    read = 0
    for run in runs:
        async for group in history.operations(store, run):
            within = [(hour, each) for each in group if (hour := window.hour(each.accepted_at)) is not None]
            read += len(within)
            if read > limits.operations_told_max:
                raise InvalidField(
                    "starting_on", begin_of(window.first).isoformat(),
                    f"a window with at most {limits.operations_told_max} operations", "Ask for fewer hours at a time",
                )  # fmt: skip
            for hour, operation in within:
                counted[hour, run] += await asyncio.to_thread(_tokens, operation)
            if all(operation.accepted_at < window.first * _HOUR_S for operation in group):
                break
    return {key: tokens for key, tokens in counted.items() if tokens}


def checkpoints_saved(checkpoints: list[Checkpoint], window: Window) -> dict[tuple[int, RunId], int]:
    """Checkpoints that live, by the hour of their saving and run."""
    hours = [(window.hour(checkpoint.saved_at), run_of(checkpoint)) for checkpoint in checkpoints]
    return Counter((hour, run) for hour, run in hours if hour is not None)


def run_of(checkpoint: Checkpoint) -> RunId:
    return RunId(checkpoint.path.removeprefix("tinker://").partition("/")[0])


def stored_bytes(checkpoints: list[Checkpoint]) -> int:
    """Of all their files; those that several share count once."""
    return sum({checkpoint.bundle: checkpoint.size_bytes for checkpoint in checkpoints}.values())


def _tokens(operation: Operation) -> int:
    if operation.kind != "forward_backward":
        return 0
    try:
        request = proto.decode_forward_backward(zstd.decompress(operation.body_zstd, limits.body_bytes_max))
    except UserError:  # it was answered with this error, and trained nothing
        return 0
    return sum(datum.tokens.size for datum in request.data)
