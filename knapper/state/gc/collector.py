"""The garbage collector of a deployment: it decides when to visit each session. `session` and `journal` delete.

    runs            superseded snapshots and old results. A run whose session ended long ago ends too.
    samplers        superseded by newer weights of their run, or of a session that is over, once unused for a while.
    checkpoints     a name expires, or its owner deletes it. Its files go once no name and no sampler of any session
                    refers to them, and a grace period for loads under way has passed.
    bundles         unnamed files of an answered operation: nothing will name them any more.
    sessions        the records of one that was over long ago and has no checkpoint.

Marks and the gateway's events say which sessions to visit: a session without objects costs nothing, an idle one ever
less. Safe to interrupt anywhere, to repeat, and to run in several processes at once.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf

import structlog

from knapper.errors import KnapperError, NotFound, Unavailable
from knapper.ids import RunId, SamplerId, SessionId, session_of
from knapper.state import damage, layout
from knapper.state.gc import marks
from knapper.state.gc.lookups import Memory, Need, Retention, SharedLookups, VisitResult
from knapper.state.gc.session import Visit, last_accepted_at
from knapper.state.journal import ends
from knapper.state.journal.records import End
from knapper.state.layout import ObjectKind
from knapper.state.sessions import Session
from knapper.store import Names, Store

_PACE_S = 300.0  # interval between visits to an active session
_PAUSE_MAX_S = 24 * 3600.0  # to an idle one, after ever longer pauses
_LISTING_S = 3600.0  # between listings, which show the marks of other processes
_FAR_S = 90 * 24 * 3600.0

log = structlog.get_logger()


async def no_job(_session: Session, _run: RunId) -> Need:
    return Need()


async def no_accounts(_tenant: str, _run: RunId) -> None:
    return None


@dataclass(frozen=True)
class _Plan:
    """The next visit to a marked session. `marks`: those seen at the last one."""

    marks: Names
    at: float
    pause_s: float


class Collector:
    """`clock`: seconds since the epoch, for expiry; `now`: monotonic seconds, for grace periods.

    `need`, `account` and `gateway`: as knapper.state.gc.lookups.Memory has them.
    """

    def __init__(
        self,
        store: Store,
        retention: Retention,
        clock: Callable[[], float],
        now: Callable[[], float],
        need: Callable[[Session, RunId], Awaitable[Need]] = no_job,
        account: Callable[[str, RunId], Awaitable[None]] = no_accounts,
        gateway: str = "",
    ) -> None:
        self._store, self._clock, self._now = store, clock, now
        self._memory = Memory(store, retention, clock, now, need, account, gateway)
        self._plans: dict[SessionId, _Plan] = {}
        self._touched: set[SessionId] = set()
        self._listed_at = self._later_at = -inf
        self._begun = False
        # Often enough that nothing outlives its retention by much.
        grace_s = min(retention.results_s, retention.samplers_s, retention.orphans_s)
        self.pace_s = max(1.0, min(_PACE_S, grace_s / 3))

    def touch_sampler(self, sampler: str) -> None:
        """A client uses the sampler, or lists it."""
        self._memory.uses.record(SamplerId(sampler))

    async def show_uses(self) -> None:
        """Tell the other gateways' collectors which samplers are used here. Raises StoreError."""
        await self._memory.uses.show()

    def touch(self, session: SessionId) -> None:
        """Something happened in the session."""
        self._touched.add(session)

    @property
    def idle_s(self) -> float:
        """Seconds until the next work, if nothing happens before."""
        if self._touched:
            return 0.0
        now = self._now()
        soonest = min((plan.at for plan in self._plans.values()), default=inf)
        return max(0.0, min(soonest - now, self._listed_at + _LISTING_S - now, self._later_at - self._clock()))

    async def work(self) -> dict[SessionId, int]:
        """Visit each session that is due; return the number of deleted objects by session.

        Does not touch the store while nothing is due. Raises StoreError; the next call continues.
        """
        if self.idle_s > 0:
            return {}
        if not self._begun:
            await marks.mark_all(self._store)
            self._begun = True
        marked = await marks.listed(self._store)
        self._listed_at = self._now()
        self._plans = {session: plan for session, plan in self._plans.items() if session in marked}
        postponed: dict[SessionId, Names] = {}
        if self._later_at <= self._clock():
            due = await marks.due(self._store, self._clock())
            postponed, self._later_at = due.sessions, min(due.next_at, self._clock() + _PAUSE_MAX_S)
        deleted: dict[SessionId, int] = {}
        shared = SharedLookups(self._memory)
        for session in sorted(marked.keys() | postponed.keys() | self._touched):
            seen, later = marked.get(session, []), postponed.get(session, [])
            is_due = later or self._is_due(session, seen)
            if is_due and (count := await self._visit(session, seen, later, shared)):
                deleted[session] = count
        return deleted

    def _is_due(self, session: SessionId, seen: Names) -> bool:
        plan = self._plans.get(session)
        return plan is None or session in self._touched or plan.marks != seen or plan.at <= self._now()

    async def _visit(self, session: SessionId, seen: Names, later: Names, shared: SharedLookups) -> int:
        before = self._plans.pop(session, None)
        is_idle = session not in self._touched and (later if before is None else before.marks == seen)
        self._touched.discard(session)  # a touch from here on calls for another visit
        try:
            result = await Visit(self._memory, session, shared, set()).go()
        except Unavailable:
            self._touched.add(session)
            raise
        except KnapperError as error:  # a damaged record, say: the other sessions are collected all the same
            log.error("a session cannot be collected", session=session, code=error.code, reason=str(error))
            result = VisitResult(left=True, next_s=_LISTING_S)
        self._touched |= result.others
        if not result.left:
            await marks.remove(self._store, [*seen, *later])
            return result.deleted
        pause_s = self.pace_s
        if is_idle and not result.deleted:
            pause_s = _PAUSE_MAX_S if before is None else min(2 * before.pause_s, _PAUSE_MAX_S)
        delay_s = max(self.pace_s, min(result.next_s, inf if result.over else pause_s, _FAR_S))
        await self._schedule(session, seen, later, delay_s, pause_s)
        return result.deleted

    async def _schedule(self, session: SessionId, seen: Names, later: Names, delay_s: float, pause_s: float) -> None:
        """Plan the next visit. One far ahead is left to a mark for later: neither listed nor remembered before."""
        if delay_s > _LISTING_S:
            until = self._clock() + delay_s
            await marks.put_off(self._store, session, until)
            self._later_at = min(self._later_at, until)
            remaining: Names = []
        else:
            if not seen:
                await marks.put(self._store, session, "again")
            remaining = seen[:1]
            self._plans[session] = _Plan(remaining, self._now() + delay_s, pause_s)
        await marks.remove(self._store, [*seen[len(remaining) :], *later])

    async def visit(self, session: SessionId, *runs: RunId, shared: SharedLookups | None = None) -> VisitResult:
        """Delete the session's garbage. `runs`: known runs of it, in case it has no record."""
        return await Visit(self._memory, session, shared or SharedLookups(self._memory), set(runs)).go()

    async def delete(self, run: RunId, tenant: str) -> int:
        """End the run and delete its journal, snapshots, checkpoints and samplers. Return how many objects.

        Files that another run's copy or another session's sampler uses stay. The next visit to the session finishes an
        interrupted deletion.
        """
        session = session_of(run)
        await marks.put(self._store, session, f"{run}-deleted")
        self.touch(session)
        # A damaged run can be deleted too; its usage is then accounted for up to the damage.
        asked_at = await damage.unless(last_accepted_at(self._store, run), 0.0)
        await damage.unless(self._memory.account(tenant, run), None)
        await ends.end(self._store, run, End(reason="deleted", tenant=tenant, at=self._clock(), asked_at=asked_at))
        visit = Visit(self._memory, session, SharedLookups(self._memory), {run})
        await visit.deleted_run(run, tenant)
        self._touched |= visit.result.others
        return visit.result.deleted

    async def delete_of_any_tenant(self, run: RunId) -> tuple[str, int]:
        """As `delete`, for the operator; return (tenant, objects). Raises NotFound if there is no such run."""
        end = await ends.ended(self._store, run)
        tenant = end.tenant if end is not None else await self._owner(run)
        return tenant, await self.delete(run, tenant)

    async def _owner(self, run: RunId) -> str:
        """The run's tenant. Raises NotFound."""
        try:
            creation = await self._memory.acceptor.creation(run)
        except damage.ERRORS as error:  # the tenants' lists have the owner too
            damage.report(error)
            for tenant, listed in await self._memory.register.runs_of_all_tenants():
                if listed == run:
                    return tenant
            raise
        if creation is None:
            raise NotFound(f"training run {run!r} does not exist; `tinker run list` shows those that do")
        return creation.spec.tenant

    async def sweep(self) -> dict[SessionId, int]:
        """Visit every session that has any object; return the number of deleted objects by session.

        Unreferenced files get no grace period. Superseded samplers of living sessions are left to the gateway, which
        knows whether they are in use.
        """
        runs: dict[SessionId, set[RunId]] = {}
        for name in await self._store.list(layout.RUNS):
            run = layout.run_of(name)
            runs.setdefault(session_of(run), set()).add(run)
        for kind in (ObjectKind.SESSION, ObjectKind.SAMPLER, ObjectKind.EXPORT_PART):
            for name in await self._store.list(kind.under()):
                runs.setdefault(layout.owner_of(name), set())
        deleted: dict[SessionId, int] = {}
        shared = SharedLookups(self._memory, at_once=True)
        for session, known in sorted(runs.items()):
            await marks.put(self._store, session, "swept")
            result = await self.visit(session, *known, shared=shared)
            if result.deleted:
                deleted[session] = result.deleted
        return deleted
