"""The ledger of training usage: a run's journal is read once it is idle, and its entries answer all later questions.

A mark says that the run may have usage that no entry has yet. It is written before an operation, and again before the
first operation half an hour later. A mark is deleted by the process that reads the journal an hour after the mark was
written (or five minutes after the session has finished) and finds every operation answered: the journal then has all
marked operations, unless a request took half an hour. Entries are written before the record of how far they go, and
both before a mark is deleted. A crash in between leaves work that the next process repeats, with the same entries.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog

from knapper import limits
from knapper.errors import KnapperError
from knapper.ids import RunId, SessionId, Tenant, session_of
from knapper.state import damage, layout, ledger_entries, usage
from knapper.state.journal.records import Commit, Operation, decode
from knapper.state.layout import ObjectKind
from knapper.state.ledger_entries import LedgerEntry, Through
from knapper.state.sessions import Sessions
from knapper.state.tenant_index import Register
from knapper.state.usage import HOUR_S, Window
from knapper.store import Store, many
from knapper.store.cache import LruCache

_MARK_S = 1800.0  # the interval of marks for a busy run
_IDLE_S, _FINISHED_IDLE_S = 3600.0, 300.0  # age of a mark, or of the session's end, before it may go
_BEGAN = ObjectKind.LEDGER_BEGAN.key()  # exists once all runs of earlier releases are marked

log = structlog.get_logger()
Use = dict[tuple[int, RunId], tuple[int, float]]  # (hour, run) -> (tokens, device seconds)


@dataclass(frozen=True)
class _Mark:
    name: str
    tenant: Tenant
    run: RunId
    at: float

    @staticmethod
    def parse(name: str) -> "_Mark":
        tenant, run, at_us, _ = ObjectKind.LEDGER_MARK.parse(name)
        return _Mark(name, Tenant(tenant), RunId(run), int(at_us) / 1e6)


@dataclass(frozen=True)
class _Accepted:
    """An operation without its body."""

    seq: int
    at: float
    tokens: int


@dataclass(frozen=True)
class _Committed:
    """A commit without its bodies. `results`: (seq, whether it failed); a fence has none."""

    n: int
    at: float
    device_s: float
    results: tuple[tuple[int, bool], ...]

    @staticmethod
    def of(n: int, commit: Commit) -> "_Committed":
        results = tuple((result.seq, result.failed) for result in commit.results)
        return _Committed(n, commit.committed_at, commit.device_s, results)


class Accounts:
    """The ledger of all runs. `clock`: seconds since the epoch; `now`: monotonic seconds; `new_id`: random."""

    def __init__(
        self, store: Store, clock: Callable[[], float], now: Callable[[], float], new_id: Callable[[], str]
    ) -> None:
        self._store = store
        self._sessions = Sessions(store)
        self._clock = clock
        self._now = now
        self._new_id = new_id
        self._begun = False
        self._announced = False  # whether the store says so
        self._marked: LruCache[RunId, float] = LruCache()
        self._through: LruCache[RunId, Through] = LruCache()
        # Operations and commits that passed through this process, which saves reading them.
        self._accepted: LruCache[tuple[RunId, int], _Accepted] = LruCache()
        self._committed: LruCache[tuple[RunId, int], _Committed] = LruCache()

    # -- written by gateways -------------------------------------------------------------------------------------------

    async def mark(self, tenant: Tenant, run: RunId) -> bool:
        """Call before an operation of the run is stored. True if that wrote a new mark."""
        now, marked_at = self._now(), self._marked.known(run)
        if marked_at is not None and now - marked_at < _MARK_S:
            return False
        await self._store.put_if_absent(_mark(tenant, run, self._clock(), self._new_id()), b"")
        self._marked.keep(run, now)
        return True

    def forget(self, session: SessionId) -> None:
        """The session has finished; later operations of its runs get a new mark."""
        for run in self._marked.known_keys():
            if session_of(run) == session:
                self._marked.forget(run)

    def note_accepted(self, run: RunId, seq: int, accepted_at: float, tokens: int) -> None:
        """The operation was accepted. `tokens`: of a forward pass."""
        self._accepted.keep((run, seq), _Accepted(seq, accepted_at, tokens))

    def note_committed(self, run: RunId, n: int, commit: Commit) -> None:
        """Record `n` is durable."""
        self._committed.keep((run, n), _Committed.of(n, commit))

    # -- read by them --------------------------------------------------------------------------------------------------

    async def begun(self) -> bool:
        """Whether every run with usage has a mark or entries; until then the journals must be read."""
        if not self._begun:
            is_new_store = not await self._store.list(ObjectKind.TENANT_RUN.under(), limit=1)
            self._begun = is_new_store or await self._store.get(_BEGAN) is not None
        return self._begun

    async def used(self, tenant: Tenant, window: Window, *, all_of_them: bool = False) -> Use:
        """By hour and run: the entries, and the later usage in the journals of marked runs.

        Raises InvalidField if there is too much for one response, unless `all_of_them`.
        """
        names = await self._store.list(ObjectKind.LEDGER_MARK.under(tenant))
        marked = {mark.run for mark in damage.parsed(names, _Mark.parse)}
        since = {run: await self._known_through(run) for run in sorted(marked)}
        entries = await ledger_entries.within(self._store, tenant, window)  # last, so that none is missed
        read = 0
        for run, through in since.items():
            tail = await damage.unless(self._tail(run, through), None)
            if tail is None:  # damaged: the entries still have the earlier usage of this run
                continue
            read += sum(window.hour(operation.at) is not None for operation in tail.accepted if operation.seq > 0)
            if read > limits.operations_listed_max and not all_of_them:
                raise usage.too_much(window, "operations that no ledger entry has yet")
            for hour in tail.hours:
                if window.first <= hour < window.end:
                    entry = entries.get((hour, run), LedgerEntry(hour, run, Through()))
                    entries[hour, run] = tail.added_to(entry)
        return {key: (entry.tokens, entry.device_s) for key, entry in entries.items()}

    async def update(self) -> bool:
        """Bring the entries of all marked runs up to date, and delete the marks of idle ones.

        True if some runs are not idle. Safe to interrupt, and to run twice at once.
        """
        if not self._announced:
            await self._begin()
        marks: dict[tuple[Tenant, RunId], list[_Mark]] = {}
        for mark in damage.parsed(await self._store.list(ObjectKind.LEDGER_MARK.under()), _Mark.parse):
            marks.setdefault((mark.tenant, mark.run), []).append(mark)
        at, more = self._clock(), False
        for (tenant, run), of_run in marks.items():
            try:
                more = not await self._update(tenant, run, of_run, at) or more
            except KnapperError as error:  # damaged, say: the other runs go on
                more = True
                log.warning("a run is not accounted for", run=run, code=error.code, reason=str(error))
        return more

    async def account(self, tenant: str, run: RunId) -> None:
        """Bring the run's entries up to date, before its journal is deleted."""
        tail = await self._tail(run, await self._known_through(run))
        if tail.since < tail.through:
            await self._account(Tenant(tenant), run, tail.answered)

    async def _update(self, tenant: Tenant, run: RunId, marks: list[_Mark], at: float) -> bool:
        """True if the run is idle. `at`: when the marks were listed."""
        tail = await self._tail(run, await self._known_through(run))
        if tail.since < tail.through:
            await self._account(tenant, run, tail.answered)
        old = [mark for mark in marks if at - mark.at >= _IDLE_S]
        if len(old) < len(marks) and await self._finished_before(session_of(run), at - _FINISHED_IDLE_S):
            old = marks
        is_idle = len(old) == len(marks) and not tail.pending
        for mark in old if is_idle else old[: len(marks) - 1]:  # the newest mark stays
            await self._store.delete(mark.name)
        return is_idle

    async def _account(self, tenant: Tenant, run: RunId, tail: "_Tail") -> None:
        for hour in tail.hours:
            entry = await ledger_entries.of_run(self._store, tenant, hour, run)
            if entry.through < tail.through:
                await ledger_entries.write(self._store, tenant, tail.added_to(entry))
        prefix = layout.accounted(run)
        earlier = await self._store.list(prefix)
        await self._store.put_if_absent(f"{prefix}{tail.through}", b"")
        for name in earlier:
            if name < f"{prefix}{tail.through}":
                await self._store.delete(name)
        self._through.keep(run, tail.through)

    async def _finished_before(self, session: SessionId, at: float) -> bool:
        finish = await self._sessions.finished(session)
        return finish is not None and finish.finished_at <= at

    async def _known_through(self, run: RunId) -> Through:
        """How far the run's entries go, at least."""

        async def load() -> Through:
            names = await self._store.list(layout.accounted(run))
            return Through.parse(names[-1].rpartition("/")[2]) if names else Through()

        return await self._through.get(run, load)

    async def _tail(self, run: RunId, since: Through) -> "_Tail":
        """Operations and commits after `since`, read by number, so that a listing that lags hides none."""
        listed = await self._store.list(layout.commits(run), start_after=layout.commit(run, since.out))
        first = since.out + 1 if since.out else layout.last_number(listed[0]) if listed else 1
        last = layout.last_number(listed[-1]) if listed else since.out
        records = await many.each(range(first, last + 1), lambda n: self._read_committed(run, n))
        committed = [commit for commit in records if commit is not None]
        results = [result for commit in committed for result in commit.results]
        through = Through(max([since.next, *(seq + 1 for seq, _ in results)]), last)
        succeeded = [seq for seq, failed in results if not failed and seq >= since.next]
        pending = await self._store.list(
            layout.operations(run), start_after=layout.operation(run, through.next - 1) if through.next else ""
        )
        seqs = [*succeeded, *map(layout.last_number, pending)]
        operations = await many.each(seqs, lambda seq: self._read_accepted(run, seq))
        accepted = [operation for operation in operations if operation is not None]
        return _Tail(since, through, accepted, committed, bool(pending))

    async def _read_accepted(self, run: RunId, seq: int) -> "_Accepted | None":
        if (cached := self._accepted.known((run, seq))) is not None:
            return cached
        name = layout.operation(run, seq)
        data = await self._store.get(name)
        if data is None:
            return None  # collected: it was answered long ago
        operation = decode(data, Operation, name)
        accepted = _Accepted(seq, operation.accepted_at, await many.off_loop(usage.tokens_of, operation))
        self._accepted.keep((run, seq), accepted)
        return accepted

    async def _read_committed(self, run: RunId, n: int) -> "_Committed | None":
        if (cached := self._committed.known((run, n))) is not None:
            return cached
        name = layout.commit(run, n)
        data = await self._store.get(name)
        if data is None:
            return None
        committed = _Committed.of(n, decode(data, Commit, name))
        self._committed.keep((run, n), committed)
        return committed

    async def _begin(self) -> None:
        """Mark the runs of earlier releases, once in the life of a store."""
        if await self._store.get(_BEGAN) is None:
            runs = [] if self._begun else await Register(self._store).runs_of_all_tenants()
            await many.each(runs, lambda run: self._store.put_if_absent(_mark(*run, 0.0, "before"), b""))
            await self._store.put_if_absent(_BEGAN, b"")
            log.debug("runs are accounted for from now on", before=len(runs))
        self._begun = self._announced = True


@dataclass(frozen=True)
class _Tail:
    """A run's operations after `since`, without failed ones, which used no tokens, and its commits.

    `through`: how far the commits go. `pending`: whether an operation is not answered yet.
    """

    since: Through
    through: Through
    accepted: list[_Accepted]
    committed: list[_Committed]
    pending: bool

    @property
    def times(self) -> list[float]:
        return [operation.at for operation in self.accepted] + [
            commit.at for commit in self.committed if commit.results
        ]

    @property
    def hours(self) -> list[int]:
        return sorted({int(at // HOUR_S) for at in self.times})

    @property
    def answered(self) -> "_Tail":
        """The tail without pending operations."""
        return replace(self, accepted=[operation for operation in self.accepted if operation.seq < self.through.next])

    def added_to(self, entry: LedgerEntry) -> LedgerEntry:
        """The entry of an hour, with the usage that it does not have yet."""
        tokens, device_s = entry.tokens, entry.device_s
        for operation in self.accepted:
            if operation.seq >= entry.through.next and int(operation.at // HOUR_S) == entry.hour:
                tokens += operation.tokens
        for commit in self.committed:
            if commit.n > entry.through.out and int(commit.at // HOUR_S) == entry.hour:
                device_s += commit.device_s
        return replace(entry, through=self.through, tokens=tokens, device_s=device_s)


def _mark(tenant: Tenant, run: RunId, at: float, mark_id: str) -> str:
    return ObjectKind.LEDGER_MARK.key(tenant, run, int(at * 1e6), mark_id)
