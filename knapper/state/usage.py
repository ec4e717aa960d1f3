"""A tenant's usage: trained tokens from the journal; saved checkpoints and sampled tokens from records.

The journal has at least a week, and every run since its second newest snapshot. Samples are not in the journal: the
gateway counts them and stores the counts.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

import msgspec

from knapper import limits
from knapper.errors import InvalidField, UserError
from knapper.ids import RunId, number
from knapper.state import damage
from knapper.state.checkpoint_index import CheckpointEntry
from knapper.state.journal import history
from knapper.state.journal.records import Operation, Record, decode
from knapper.state.layout import ObjectKind
from knapper.store import Names, Store
from knapper.store.cache import LruCache
from knapper.wire import proto

HOUR_S = 3600
_PAGE = 999  # names a listing, as a bucket returns them in one request


class Sampled(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens of prompts (each once, however many samples it had) and of samples, of one session and model.

    `device_s`: device seconds for them; a sample that was computed twice counts once.
    """

    session: str  # empty: none
    base_model: str
    prompt: int = 0
    sampled: int = 0
    device_s: float = 0.0

    def plus(self, prompt: int, sampled: int, device_s: float) -> "Sampled":
        return msgspec.structs.replace(
            self, prompt=self.prompt + prompt, sampled=self.sampled + sampled, device_s=self.device_s + device_s
        )


class Samplings(Record, frozen=True, kw_only=True):
    """The counts of one gateway in a minute of that hour."""

    v: int = 2  # the rows of 1 had no device_s
    rows: list[Sampled]


@dataclass(frozen=True)
class Window:
    """[first, end) in hours since the epoch."""

    first: int
    end: int

    def hour(self, at: float) -> int | None:
        """The hour of a time, or None outside the window."""
        hour = int(at // HOUR_S)
        return hour if self.first <= hour < self.end else None


def begin_of(hour: int) -> datetime:
    return datetime.fromtimestamp(hour * HOUR_S, UTC)


def record_name(tenant: str, hour: int, record_id: str) -> str:
    return ObjectKind.USAGE.key(tenant, hour, record_id)


async def names_within(store: Store, prefix: str, window: Window) -> Names:
    """All names `<prefix><hour>/...` in the window; nothing after it is listed."""
    end, after = f"{prefix}{number(window.end)}", f"{prefix}{number(window.first)}"
    names: Names = []
    while page := await store.list(prefix, start_after=after, limit=_PAGE):
        names += [name for name in page if name < end]
        after = page[-1]
        if len(page) < _PAGE or after >= end:
            break
    return names


async def tokens_sampled(store: Store, tenant: str, window: Window) -> list[tuple[int, Sampled]]:
    """(hour, tokens) of each hour, session and model. Raises InvalidField if there is too much for one response."""

    async def read(name: str) -> tuple[int, list[Sampled]]:
        data = await store.get(name)
        assert data is not None, "usage records are never deleted"
        return int(ObjectKind.USAGE.parse(name)[1]), decode(data, Samplings, name).rows

    names = await names_within(store, ObjectKind.USAGE.under(tenant), window)
    if len(names) > limits.operations_listed_max:
        raise too_much(window, "minutes of samples")
    totals: dict[tuple[int, str, str], Sampled] = {}
    for hour, rows in await damage.readable(names, read):
        for row in rows:
            key = hour, row.session, row.base_model
            before = totals.get(key, Sampled(session=row.session, base_model=row.base_model))
            totals[key] = before.plus(row.prompt, row.sampled, row.device_s)
    return [(hour, total) for (hour, _, _), total in totals.items()]


class SampledTotals:
    """The number of tokens that samples of a tenant had, prompts included. Records are read once: they never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tokens: LruCache[str, int] = LruCache()

    async def within(self, tenant: str, window: Window) -> int:
        names = await names_within(self._store, ObjectKind.USAGE.under(tenant), window)
        return sum(await damage.readable(names, lambda name: self._tokens.get(name, lambda: self._read(name))))

    async def _read(self, name: str) -> int:
        data = await self._store.get(name)
        assert data is not None, "usage records are never deleted"
        return sum(row.prompt + row.sampled for row in decode(data, Samplings, name).rows)


async def tokens_trained(store: Store, runs: list[RunId], window: Window) -> dict[tuple[int, RunId], int]:
    """Tokens of the accepted forward_backward requests (forward alone too), by hour and run.

    Raises InvalidField if the window has too many operations for one response.
    """
    counted: Counter[tuple[int, RunId]] = Counter()
    read = 0
    for run in runs:
        async for group in history.operations(store, run):
            within = [
                (hour, operation) for operation in group if (hour := window.hour(operation.accepted_at)) is not None
            ]
            read += len(within)
            if read > limits.operations_listed_max:
                raise too_much(window, "operations")
            for hour, operation in within:
                counted[hour, run] += await damage.unless(asyncio.to_thread(tokens_of, operation), 0)
            if all(operation.accepted_at < window.first * HOUR_S for operation in group):
                break
    return {key: tokens for key, tokens in counted.items() if tokens}


async def device_seconds(store: Store, runs: list[RunId], window: Window) -> dict[tuple[int, RunId], float]:
    """Device seconds of the published results, by hour and run; replays count nothing.

    Raises InvalidField if the window has too many operations for one response.
    """
    seconds: dict[tuple[int, RunId], float] = {}
    read = 0
    for run in runs:
        async for group in history.commits(store, run):
            read += sum(window.hour(commit.committed_at) is not None for commit in group)
            if read > limits.operations_listed_max:
                raise too_much(window, "operations")
            for commit in group:
                if (hour := window.hour(commit.committed_at)) is not None:
                    seconds[hour, run] = seconds.get((hour, run), 0.0) + commit.device_s
            if group and all(commit.committed_at < window.first * HOUR_S for commit in group):
                break
    return seconds


def checkpoints_saved(living: list[CheckpointEntry], window: Window) -> dict[tuple[int, RunId], int]:
    """Living checkpoints, by the hour of their save and by run."""
    hours = [(window.hour(label.saved_at), label.path.run) for label in living]
    return Counter((hour, run) for hour, run in hours if hour is not None)


def stored_bytes(living: list[CheckpointEntry]) -> int:
    """The size of all their files; shared ones count once."""
    return sum({label.bundle: label.size_bytes for label in living}.values())


def tokens_of(operation: Operation) -> int:
    """Tokens of a forward pass; 0 for other operations. Slow: it decodes the body."""
    if operation.kind != "forward_backward":
        return 0
    try:
        request = proto.decode_forward_backward(operation.body())
    except UserError:  # its result is this error, and it trained nothing
        return 0
    return sum(datum.tokens.size for datum in request.data)


def too_much(window: Window, what: str) -> InvalidField:
    allowed = f"a window with at most {limits.operations_listed_max} {what}"
    begin = begin_of(window.first).isoformat()
    return InvalidField("starting_on", begin, allowed, "Ask for fewer hours at a time")
