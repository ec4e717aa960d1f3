"""The collector of a deployment: when each session is looked at. What is deleted: see `session` and `journal`.

    runs            superseded snapshots, old answers. A run whose session ended long ago ends too: its state goes.
    samplers        those that newer weights of their run superseded, and those of sessions that are over, once nobody
                    has asked for them for a while.
    checkpoints     a name goes by its time to live, or by its owner's word. Its files go once no name and no sampler,
                    of whatever session, leads to them any more, and loads under way have had their time.
    bundles         files that were never named, of an operation that is answered: nobody will name them.
    sessions        records of one that was over long ago and has no checkpoint.

Driven by marks and by what the gateway has seen: a session of which nothing is left costs nothing, one in which nothing
happens ever less. It may be cut off anywhere, repeated, and done by several at once.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import inf

import structlog

from knapper.errors import KnapperError, NotFound, Unavailable
from knapper.ids import RunId, SamplerId, SessionId, session_of
from knapper.state import damage, layout
from knapper.state.gc import marks
from knapper.state.gc.lookups import Look, Memory, Need, Retention, SharedLookups
from knapper.state.gc.session import Visit, asked_of
from knapper.state.journal import ends
from knapper.state.journal.records import End
from knapper.state.layout import ObjectKind
from knapper.state.sessions import Session
from knapper.store import Names, Store

_PACE_S = 300.0  # a session that changes is looked at so often,
_REST_S = 24 * 3600.0  # and one that does not ever later, up to this
_LOOK_S = 3600.0  # what other processes have marked is seen so soon
_FAR_S = 90 * 24 * 3600.0

log = structlog.get_logger()


async def no_job(_session: Session, _run: RunId) -> Need:
    return Need()


async def no_accounts(_tenant: str, _run: RunId) -> None:
    return None


@dataclass(frozen=True)
class _Plan:
    """When a session is looked at again that is marked now. `marks`: those that were seen."""

    marks: Names
    at: float
    pause_s: float


class Collector:
    """`clock`: seconds since the epoch, by which things expire; `now`: monotonic seconds, by which grace is counted.

    `need` and `account`: as knapper.state.gc.lookups.Memory has them.
    """

    def __init__(
        self,
        store: Store,
        retention: Retention,
        clock: Callable[[], float],
        now: Callable[[], float],
        need: Callable[[Session, RunId], Awaitable[Need]] = no_job,
        account: Callable[[str, RunId], Awaitable[None]] = no_accounts,
    ) -> None:
        self._store, self._clock, self._now = store, clock, now
        self._memory = Memory(store, retention, clock, now, need, account)
        self._plans: dict[SessionId, _Plan] = {}
        self._touched: set[SessionId] = set()
        self._listed_at = self._later_at = -inf
        self._begun = False
        # Often enough that nothing stays much longer than it is to be kept.
        grace_s = min(retention.results_s, retention.samplers_s, retention.orphans_s)
        self.pace_s = max(1.0, min(_PACE_S, grace_s / 3))

    def ask(self, sampler: str) -> None:
        """Somebody uses the sampler, or lists it."""
        self._memory.asked[SamplerId(sampler)] = self._now()

    def touch(self, session: SessionId) -> None:
        """Something happened in the session."""
        self._touched.add(session)

    @property
    def rest_s(self) -> float:
        """How long nothing has to be done, if nothing happens."""
        if self._touched:
            return 0.0
        now = self._now()
        soonest = min((plan.at for plan in self._plans.values()), default=inf)
        return max(0.0, min(soonest - now, self._listed_at + _LOOK_S - now, self._later_at - self._clock()))

    async def work(self) -> dict[SessionId, int]:
        """Look at each session whose time has come; return where how many objects were deleted.

        Asks nothing of the store while nothing has happened and no time has come. Raises StoreError; the next call goes
        on.
        """
        if self.rest_s > 0:
            return {}
        if not self._begun:
            await marks.mark_all(self._store)
            self._begun = True
        found = await marks.listed(self._store)
        self._listed_at = self._now()
        self._plans = {session: plan for session, plan in self._plans.items() if session in found}
        off: dict[SessionId, Names] = {}
        if self._later_at <= self._clock():
            due = await marks.due(self._store, self._clock())
            off, self._later_at = due.sessions, min(due.next_at, self._clock() + _REST_S)
        deleted: dict[SessionId, int] = {}
        during = SharedLookups(self._memory)
        for session in sorted(found.keys() | off.keys() | self._touched):
            seen, put_off = found.get(session, []), off.get(session, [])
            is_due = put_off or self._is_due(session, seen)
            if is_due and (count := await self._look(session, seen, put_off, during)):
                deleted[session] = count
        return deleted

    def _is_due(self, session: SessionId, seen: Names) -> bool:
        plan = self._plans.get(session)
        return plan is None or session in self._touched or plan.marks != seen or plan.at <= self._now()

    async def _look(self, session: SessionId, seen: Names, put_off: Names, during: SharedLookups) -> int:
        before = self._plans.pop(session, None)
        quiet = session not in self._touched and (put_off if before is None else before.marks == seen)
        self._touched.discard(session)  # what touches it from here on is for the next time
        try:
            look = await Visit(self._memory, session, during, set()).go()
        except Unavailable:
            self._touched.add(session)
            raise
        except KnapperError as error:  # a damaged record, say: everything else is collected all the same
            log.error("a session cannot be collected", session=session, code=error.code, reason=str(error))
            look = Look(left=True, next_s=_LOOK_S)
        self._touched |= look.others
        if not look.left:
            await marks.remove(self._store, [*seen, *put_off])
            return look.deleted
        pause_s = self.pace_s
        if quiet and not look.deleted:
            pause_s = _REST_S if before is None else min(2 * before.pause_s, _REST_S)
        again_s = max(self.pace_s, min(look.next_s, inf if look.over else pause_s, _FAR_S))
        await self._again(session, seen, put_off, again_s, pause_s)
        return look.deleted

    async def _again(self, session: SessionId, seen: Names, put_off: Names, again_s: float, pause_s: float) -> None:
        """What is put off for long is not listed any more before its time, nor does this process remember it."""
        if again_s > _LOOK_S:
            until = self._clock() + again_s
            await marks.put_off(self._store, session, until)
            self._later_at = min(self._later_at, until)
            kept: Names = []
        else:
            if not seen:
                await marks.put(self._store, session, "again")
            kept = seen[:1]
            self._plans[session] = _Plan(kept, self._now() + again_s, pause_s)
        await marks.remove(self._store, [*seen[len(kept) :], *put_off])

    async def look(self, session: SessionId, *runs: RunId, during: SharedLookups | None = None) -> Look:
        """Delete what may go of the session by now. `runs`: that are known to be in it, should it have no record."""
        return await Visit(self._memory, session, during or SharedLookups(self._memory), set(runs)).go()

    async def delete(self, run: RunId, tenant: str) -> int:
        """End the run, and delete what is of it: journal, snapshots, checkpoints, samplers. Return how many objects.

        Files that another run's copy, or a sampler of another session, leads to stay for those. What is cut off here
        the next look at the session finishes.
        """
        session = session_of(run)
        await marks.put(self._store, session, f"{run}-deleted")
        self.touch(session)
        # What is damaged can be deleted, too: what it used is told up to there.
        asked_at = await damage.unless(asked_of(self._store, run), 0.0)
        await damage.unless(self._memory.account(tenant, run), None)
        await ends.end(self._store, run, End(reason="deleted", tenant=tenant, at=self._clock(), asked_at=asked_at))
        visit = Visit(self._memory, session, SharedLookups(self._memory), {run})
        await visit.deleted_run(run, tenant)
        self._touched |= visit.found.others
        return visit.found.deleted

    async def delete_of_anybody(self, run: RunId) -> tuple[str, int]:
        """As `delete`, for the operator; return whose it was, too. Raises NotFound if there is no such run."""
        end = await ends.ended(self._store, run)
        tenant = end.tenant if end is not None else await self._owner(run)
        return tenant, await self.delete(run, tenant)

    async def _owner(self, run: RunId) -> str:
        """Raises NotFound."""
        try:
            creation = await self._memory.acceptor.creation(run)
        except damage.ERRORS as error:  # whose it is stands in a list, too
            damage.tell(error)
            for tenant, listed in await self._memory.register.everybodys_runs():
                if listed == run:
                    return tenant
            raise
        if creation is None:
            raise NotFound(f"training run {run!r} does not exist; `tinker run list` shows those that do")
        return creation.spec.tenant

    async def sweep(self) -> dict[SessionId, int]:
        """Look at every session of which anything is there; return where how many objects were deleted.

        Files that nothing leads to get no time of grace. Superseded samplers of sessions that live are left to the
        gateway, which knows what is asked for.
        """
        runs: dict[SessionId, set[RunId]] = {}
        for name in await self._store.list(layout.RUNS):
            run = layout.run_of(name)
            runs.setdefault(session_of(run), set()).add(run)
        for kind in (ObjectKind.SESSION, ObjectKind.SAMPLER, ObjectKind.EXPORT_PART):
            for name in await self._store.list(kind.under()):
                runs.setdefault(layout.owner_of(name), set())
        deleted: dict[SessionId, int] = {}
        during = SharedLookups(self._memory, at_once=True)
        for session, known in sorted(runs.items()):
            await marks.put(self._store, session, "swept")
            look = await self.look(session, *known, during=during)
            if look.deleted:
                deleted[session] = look.deleted
        return deleted
