"""The runs that this process holds.

Claimed on the first bell, worked on in slices, dropped when fenced or long unused.
"""

import asyncio
import itertools
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Generic

import msgspec
import structlog

from knapper import limits
from knapper.errors import KnapperError, NotHolder, StoreError, Unavailable
from knapper.events.cloudevents import Claimed, Committed, Done, Frame, Hint
from knapper.ids import RunId
from knapper.observability import metrics
from knapper.serving import claims
from knapper.state.gc import journal
from knapper.state.journal.holder import Holder
from knapper.state.journal.machine import Machine, State
from knapper.state.journal.newest import Manifests
from knapper.state.journal.records import Commit
from knapper.state.journal.run import Run
from knapper.store import Store

_RESIDENTS_MAX = 64  # states in memory; more than that, and the longest unused is dropped (its journal has everything)

log = structlog.get_logger()


@dataclass
class _Resident(Generic[State]):
    """One claimed run. `lock` keeps slices apart.

    Snapshots run beside them, one at a time (`snapshots`), the last when all is quiet.
    """

    run: Run[State] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    snapshots: asyncio.Lock = field(default_factory=asyncio.Lock)
    rest: asyncio.TimerHandle | None = None  # of the last bell; it changes with the next
    background: asyncio.Task[None] | None = None
    work: asyncio.Task[bool] | None = None  # of the slice under way, or the last one


class ClaimedRuns(Generic[State]):
    """Answers bells. A run that none came for in `rest_s` leaves the memory; 0: never."""

    def __init__(
        self,
        store: Store,
        machine: Machine[State],
        holder: Holder,
        clock: Callable[[], float],
        *,
        rest_s: float = 0.0,
    ) -> None:
        self._store = store
        self._machine = machine
        self._holder = holder
        self._clock = clock
        self._rest_s = rest_s
        self._manifests = Manifests(store)
        self._residents: OrderedDict[RunId, _Resident[State]] = OrderedDict()
        self._claims = itertools.count(1)
        self._leaving = False

    @property
    def present(self) -> int:
        """Runs whose state is in memory."""
        return sum(resident.run is not None for resident in self._residents.values())

    def leave(self) -> None:
        """This process is about to end: slices end after the operation under way, and bells are refused."""
        self._leaving = True

    async def answer(self, of: RunId, hint: Hint | None = None) -> AsyncIterator[Frame]:
        """Work on the run for a slice. `hint`: of a gateway that knows who holds it; without one, it is taken over.

        Yield each commit as it becomes durable. Raises KnapperError: ring again, unless the user's.

        The work goes on to the end of the operation even if nobody reads; what is durable is found in the store.
        """
        resident = self._resident(of)
        await resident.lock.acquire()
        try:
            if resident.rest is not None:
                resident.rest.cancel()
            if self._leaving:
                raise NotHolder(f"{self._holder.name} is leaving, and works on {of} no more")
            run = await self._claimed(of, resident, hint)
            age_s = metrics.process_age_s() or 0.0
            claimed = Claimed(
                epoch=run.epoch, holder=run.holder.name, address=run.holder.address, age_s=age_s, out=run.out
            )  # fmt: skip
            async with aclosing(self._slice(run, resident, claimed)) as frames:
                async for frame in frames:
                    yield frame
        except Unavailable as error:
            # The same claim goes on with the next bell: it counts what fails again and again.
            log.warning("slice broken off", run=of, code=error.code, reason=str(error))
            raise
        except KnapperError as error:
            log.warning("run dropped from memory", run=of, code=error.code, reason=str(error))
            resident.run = None
            raise
        finally:
            # Nothing is awaited here: a reader that leaves is cancelled again at every await, and a lock let go before
            # the work has ended would let two slices into one run.
            if resident.work is None or resident.work.done():
                resident.lock.release()
            else:
                resident.work.add_done_callback(lambda work: _let_go(resident.lock, work))
            self._rest_later(resident)

    def _resident(self, run: RunId) -> _Resident[State]:
        resident = self._residents.setdefault(run, _Resident())
        self._residents.move_to_end(run)
        for other in list(self._residents):
            if len(self._residents) <= _RESIDENTS_MAX:
                break
            if not self._residents[other].lock.locked() and other != run:
                del self._residents[other]
        return resident

    async def _claimed(self, run: RunId, resident: _Resident[State], hint: Hint | None) -> Run[State]:
        if resident.run is not None and hint is not None and hint.epoch > resident.run.epoch:
            log.warning("run dropped from memory", run=run, reason=f"{hint.holder} claimed it at epoch {hint.epoch}")
            resident.run = None
        if resident.run is None:
            if hint is not None and self._holder.address:
                await claims.expect_free(self._store, run, self._holder, hint, self._clock(), self._manifests)
            began = self._clock()
            holder = replace(self._holder, name=f"{self._holder.name}/{next(self._claims)}")
            resident.run = await Run.claim(self._store, run, self._machine, holder, self._clock, self._manifests)
            metrics.replayed_seconds.inc(resident.run.replay_cost_s)
            tell = log.info if resident.run.epoch > 1 else log.debug  # a new run is no news
            tell(
                "run restored", run=run, epoch=resident.run.epoch, applied=resident.run.applied,
                replayed_s=round(resident.run.replay_cost_s, 2), took_s=round(self._clock() - began, 2),
            )  # fmt: skip
            if resident.run.terms_before is not None:
                log.warning(
                    "claimed on other terms: what is replayed may differ in its last bits; published results stay",
                    run=run,
                    before=msgspec.structs.asdict(resident.run.terms_before),
                    now=msgspec.structs.asdict(self._holder.terms),
                )
        return resident.run

    async def _slice(self, run: Run[State], resident: _Resident[State], claimed: Claimed) -> AsyncGenerator[Frame]:
        """The claim, told while the work begins already; its commits; its end."""
        now = asyncio.get_running_loop().time  # the clock of the day may step, and a slice stays one
        end = now() + limits.slice_s

        def over() -> bool:
            return self._leaving or now() >= end

        committed: asyncio.Queue[Frame | None] = asyncio.Queue()

        async def publish(n: int, commit: Commit) -> None:
            committed.put_nowait(Committed(n=n, commit=commit))
            if run.wants_snapshot:
                self._snapshot_in_background(run, resident)

        async def work() -> bool:
            try:
                while not over():
                    if run.must_snapshot:
                        await self._snapshot(run, resident, lambda: run.must_snapshot)
                    if not await run.apply_pending(over, publish):
                        return False
                return True
            finally:
                committed.put_nowait(None)

        task = resident.work = asyncio.ensure_future(work())
        try:
            yield claimed
            while (frame := await committed.get()) is not None:
                yield frame
            more = await asyncio.shield(task)
        finally:
            end = now()  # if the reader left: the operation under way is finished, and then `answer` lets go
        yield Done(applied=run.applied, more=more)

    async def _snapshot(self, run: Run[State], resident: _Resident[State], wanted: Callable[[], bool]) -> None:
        """Take one, unless another that was under way made it needless; and delete those that it supersedes."""
        async with resident.snapshots:
            if not wanted():
                return
            began = self._clock()
            await run.snapshot()
            log.debug("snapshot", run=run.run, applied=run.applied, took_s=round(self._clock() - began, 2))
            try:
                await journal.snapshots(self._store, run.run, run.manifest)
            except StoreError as error:
                log.debug("superseded snapshots are left to the gateway", run=run.run, reason=str(error))

    def _snapshot_in_background(self, run: Run[State], resident: _Resident[State]) -> None:
        if resident.snapshots.locked():
            return

        async def snapshot() -> None:
            try:
                await self._snapshot(run, resident, lambda: run.wants_snapshot)
            except KnapperError as error:
                log.warning("snapshot failed", run=run.run, code=error.code, reason=str(error))
                if resident.run is run:
                    resident.run = None  # the next bell claims anew

        resident.background = asyncio.ensure_future(snapshot())

    def _rest_later(self, resident: _Resident[State]) -> None:
        if resident.rest is not None:
            resident.rest.cancel()
        if self._rest_s > 0:
            resident.rest = asyncio.get_running_loop().call_later(self._rest_s, self._rest, resident)

    def _rest(self, resident: _Resident[State]) -> None:
        """No bell came for long: the run leaves the memory, stored if its replay is worth more than its bytes.

        The next bell claims it anew, from its newest snapshot, to the last bit.
        """
        run, timer = resident.run, resident.rest
        if run is None:
            return
        if _busy(resident) or resident.snapshots.locked():
            self._rest_later(resident)
            return

        async def rest() -> None:
            try:
                await self._snapshot(run, resident, lambda: run.worth_snapshot)
            except KnapperError as error:
                log.warning("snapshot failed", run=run.run, code=error.code, reason=str(error))
                if isinstance(error, Unavailable):
                    self._rest_later(resident)
                    return
            # Nothing is awaited from here on: a bell that came meanwhile keeps the run.
            if resident.run is run and resident.rest is timer and not _busy(resident):
                resident.run = None
                log.debug("run unloaded: it was idle", run=run.run, applied=run.applied)

        resident.background = asyncio.ensure_future(rest())


def _busy(resident: _Resident[Any]) -> bool:
    return resident.lock.locked() or (resident.work is not None and not resident.work.done())


def _let_go(lock: asyncio.Lock, work: asyncio.Task[bool]) -> None:
    """The end of work that nobody reads of. What it met, the next bell meets again."""
    if not work.cancelled() and (met := work.exception()) is not None:
        log.warning("a slice that nobody reads broke off", reason=str(met))
    lock.release()
