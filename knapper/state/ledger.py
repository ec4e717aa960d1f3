"""What each run has used, accounted for once the run is quiet, so that nobody reads its journal for it again.

A mark says that since then the run may have used something that no line has. It is written before an operation is,
and anew before the first operation half an hour later. It is taken away by whoever reads the journal an hour after it
was written (or five minutes after the session has finished) and finds everything answered: what was marked by it is
in the journal by then, unless a request took half an hour. Lines are written before it is told how far they go, and
both before a mark is taken away; so whoever dies in between leaves work to be done again, and that makes the same
lines.
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

_MARK_S = 1800.0  # a run that works all the time is marked anew so often
_QUIET_S, _FINISHED_QUIET_S = 3600.0, 300.0
_BEGAN = ObjectKind.LEDGER_BEGAN.key()  # every run that was made before there were marks has one

log = structlog.get_logger()
Use = dict[tuple[int, RunId], tuple[int, float]]  # by hour and run: tokens, seconds of the device


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
class _Asked:
    """An operation without its body."""

    seq: int
    at: float
    tokens: int


@dataclass(frozen=True)
class _Answered:
    """A record without its bodies. `results`: (seq, whether it failed); those of a fence are none."""

    n: int
    at: float
    device_s: float
    results: tuple[tuple[int, bool], ...]

    @staticmethod
    def of(n: int, commit: Commit) -> "_Answered":
        results = tuple((each.seq, each.failed) for each in commit.results)
        return _Answered(n, commit.committed_at, commit.device_s, results)


class Accounts:
    """Of all clients' runs. `clock`: seconds since the epoch; `now`: monotonic seconds; `new_id`: random."""

    def __init__(
        self, store: Store, clock: Callable[[], float], now: Callable[[], float], new_id: Callable[[], str]
    ) -> None:
        self._store = store
        self._sessions = Sessions(store)
        self._clock = clock
        self._now = now
        self._new_id = new_id
        self._begun = False
        self._told = False  # that it has, to all others
        self._marked: LruCache[RunId, float] = LruCache()
        self._through: LruCache[RunId, Through] = LruCache()
        # What passed through this process need not be read again.
        self._asked: LruCache[tuple[RunId, int], _Asked] = LruCache()
        self._answered: LruCache[tuple[RunId, int], _Answered] = LruCache()

    # -- what gateways tell --------------------------------------------------------------------------------------------

    async def mark(self, tenant: Tenant, run: RunId) -> bool:
        """Before an operation of the run is stored. True if that took a new mark."""
        now, marked_at = self._now(), self._marked.known(run)
        if marked_at is not None and now - marked_at < _MARK_S:
            return False
        await self._store.put_if_absent(_mark(tenant, run, self._clock(), self._new_id()), b"")
        self._marked.keep(run, now)
        return True

    def forget(self, session: SessionId) -> None:
        """It has finished: whatever comes all the same is marked anew."""
        for run in self._marked.known_keys():
            if session_of(run) == session:
                self._marked.forget(run)

    def asked(self, run: RunId, seq: int, accepted_at: float, tokens: int) -> None:
        """The operation was accepted just now; `tokens`: of a forward pass."""
        self._asked.keep((run, seq), _Asked(seq, accepted_at, tokens))

    def answered(self, run: RunId, n: int, commit: Commit) -> None:
        """Record `n` is durable."""
        self._answered.keep((run, n), _Answered.of(n, commit))

    # -- what they are asked -------------------------------------------------------------------------------------------

    async def begun(self) -> bool:
        """Whether every run that has used something is marked or accounted for: before that, ask the journals."""
        if not self._begun:
            nobody_was_here = not await self._store.list(ObjectKind.TENANT_RUN.under(), limit=1)
            self._begun = nobody_was_here or await self._store.get(_BEGAN) is not None
        return self._begun

    async def used(self, tenant: Tenant, window: Window) -> Use:
        """By hour and run: lines, and what the journals of marked runs have since.

        Raises InvalidField if there is too much for one answer.
        """
        listed = await self._store.list(ObjectKind.LEDGER_MARK.under(tenant))
        marked = {mark.run for mark in damage.parsed(listed, _Mark.parse)}
        since = {run: await self._known_through(run) for run in sorted(marked)}
        found = await ledger_entries.within(
            self._store, tenant, window
        )  # looked at last: what is settled meanwhile is in them
        read = 0
        for run, through in since.items():
            tail = await damage.unless(self._tail(run, through), None)
            if tail is None:  # a damaged record is its run's misfortune: its lines say how much it used before
                continue
            read += sum(window.hour(each.at) is not None for each in tail.asked if each.seq > 0)
            if read > limits.operations_listed_max:
                raise usage.too_much(window, "operations that no line has yet")
            for hour in tail.hours:
                if window.first <= hour < window.end:
                    line = found.get((hour, run), LedgerEntry(hour, run, Through()))
                    found[hour, run] = tail.added_to(line)
        return {key: (line.tokens, line.device_s) for key, line in found.items()}

    async def settle(self) -> bool:
        """Bring the lines of all marked runs up to date; take away the marks of those that are quiet.

        True if some are not. Safe to cut off, and to do twice at once.
        """
        if not self._told:
            await self._begin()
        marks: dict[tuple[Tenant, RunId], list[_Mark]] = {}
        for mark in damage.parsed(await self._store.list(ObjectKind.LEDGER_MARK.under()), _Mark.parse):
            marks.setdefault((mark.tenant, mark.run), []).append(mark)
        at, left = self._clock(), False
        for (tenant, run), each in marks.items():
            try:
                left = not await self._settle(tenant, run, each, at) or left
            except KnapperError as error:  # a damaged record is its run's misfortune
                left = True
                log.warning("a run is not accounted for", run=run, code=error.code, reason=str(error))
        return left

    async def account(self, tenant: str, run: RunId) -> None:
        """Bring the run's lines up to date: what they are made from is about to be deleted."""
        tail = await self._tail(run, await self._known_through(run))
        if tail.since < tail.through:
            await self._account(Tenant(tenant), run, tail.settled)

    async def _settle(self, tenant: Tenant, run: RunId, marks: list[_Mark], at: float) -> bool:
        """True if nothing is left to do for the run. `at`: when the marks were looked at."""
        tail = await self._tail(run, await self._known_through(run))
        if tail.since < tail.through:
            await self._account(tenant, run, tail.settled)
        old = [mark for mark in marks if at - mark.at >= _QUIET_S]
        if len(old) < len(marks) and await self._finished_before(session_of(run), at - _FINISHED_QUIET_S):
            old = marks
        quiet = len(old) == len(marks) and not tail.waits
        for mark in old if quiet else old[: len(marks) - 1]:  # the newest one stays
            await self._store.delete(mark.name)
        return quiet

    async def _account(self, tenant: Tenant, run: RunId, tail: "_Tail") -> None:
        for hour in tail.hours:
            line = await ledger_entries.of_run(self._store, tenant, hour, run)
            if line.through < tail.through:
                await ledger_entries.write(self._store, tenant, tail.added_to(line))
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
        """How far the run's lines go at least."""

        async def load() -> Through:
            listed = await self._store.list(layout.accounted(run))
            return Through.parse(listed[-1].rpartition("/")[2]) if listed else Through()

        return await self._through.get(run, load)

    async def _tail(self, run: RunId, since: Through) -> "_Tail":
        """What happened after `since`; by number, so that what a listing leaves out is read all the same."""
        listed = await self._store.list(layout.commits(run), start_after=layout.commit(run, since.out))
        first = since.out + 1 if since.out else layout.last_number(listed[0]) if listed else 1
        last = layout.last_number(listed[-1]) if listed else since.out
        read = await many.each(range(first, last + 1), lambda n: self._read_answered(run, n))
        answered = [each for each in read if each is not None]
        through = Through(max([since.next, *(seq + 1 for each in answered for seq, _ in each.results)]), last)
        worked = [seq for each in answered for seq, failed in each.results if not failed and seq >= since.next]
        waiting = await self._store.list(
            layout.operations(run), start_after=layout.operation(run, through.next - 1) if through.next else ""
        )
        wanted = [*worked, *map(layout.last_number, waiting)]
        asked = await many.each(wanted, lambda seq: self._read_asked(run, seq))
        return _Tail(since, through, [each for each in asked if each is not None], answered, bool(waiting))

    async def _read_asked(self, run: RunId, seq: int) -> "_Asked | None":
        if (known := self._asked.known((run, seq))) is not None:
            return known
        name = layout.operation(run, seq)
        data = await self._store.get(name)
        if data is None:
            return None  # swept: it was answered long ago
        operation = decode(data, Operation, name)
        found = _Asked(seq, operation.accepted_at, await many.off_loop(usage.tokens_of, operation))
        self._asked.keep((run, seq), found)
        return found

    async def _read_answered(self, run: RunId, n: int) -> "_Answered | None":
        if (known := self._answered.known((run, n))) is not None:
            return known
        name = layout.commit(run, n)
        data = await self._store.get(name)
        if data is None:
            return None
        found = _Answered.of(n, decode(data, Commit, name))
        self._answered.keep((run, n), found)
        return found

    async def _begin(self) -> None:
        """Mark the runs that were made before there were marks, once for all."""
        if await self._store.get(_BEGAN) is None:
            runs = [] if self._begun else await Register(self._store).everybodys_runs()
            await many.each(runs, lambda each: self._store.put_if_absent(_mark(*each, 0.0, "before"), b""))
            await self._store.put_if_absent(_BEGAN, b"")
            log.debug("runs are accounted for from now on", before=len(runs))
        self._begun = self._told = True


@dataclass(frozen=True)
class _Tail:
    """What a run was asked after `since`, but for what failed, which used no tokens; and what it was answered.

    `through`: how far the answers go. `waits`: something is not answered yet.
    """

    since: Through
    through: Through
    asked: list[_Asked]
    answered: list[_Answered]
    waits: bool

    @property
    def times(self) -> list[float]:
        return [each.at for each in self.asked] + [each.at for each in self.answered if each.results]

    @property
    def hours(self) -> list[int]:
        return sorted({int(at // HOUR_S) for at in self.times})

    @property
    def settled(self) -> "_Tail":
        """Without what is not answered."""
        return replace(self, asked=[each for each in self.asked if each.seq < self.through.next])

    def added_to(self, line: LedgerEntry) -> LedgerEntry:
        """The line of an hour, with what is not in it yet."""
        tokens, device_s = line.tokens, line.device_s
        for asked in self.asked:
            if asked.seq >= line.through.next and int(asked.at // HOUR_S) == line.hour:
                tokens += asked.tokens
        for answered in self.answered:
            if answered.n > line.through.out and int(answered.at // HOUR_S) == line.hour:
                device_s += answered.device_s
        return replace(line, through=self.through, tokens=tokens, device_s=device_s)


def _mark(tenant: Tenant, run: RunId, at: float, mark_id: str) -> str:
    return ObjectKind.LEDGER_MARK.key(tenant, run, int(at * 1e6), mark_id)
