"""The runs that this process has claimed: on their first doorbell, until they are fenced or idle."""

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

_RUNS_MAX = 64  # states in memory; beyond that the least recently used is evicted (its journal has everything)

log = structlog.get_logger()


@dataclass
class _Entry(Generic[State]):
    """One run. `lock` serializes slices. Snapshots run beside them, one at a time (`snapshots`), the last when idle."""

    run: Run[State] | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    snapshots: asyncio.Lock = field(default_factory=asyncio.Lock)
    idle_timer: asyncio.TimerHandle | None = None  # replaced by each doorbell
    background: asyncio.Task[None] | None = None
    work: asyncio.Task[bool] | None = None  # the slice under way, or the last one


class ClaimedRuns(Generic[State]):
    """Answers doorbells. A run without a doorbell for `idle_s` is unloaded; 0: never.

    States in memory are held to `bytes_max` (None: no limit): the least recently used go first.
    """

    def __init__(
        self,
        store: Store,
        machine: Machine[State],
        holder: Holder,
        clock: Callable[[], float],
        *,
        idle_s: float = 0.0,
        bytes_max: int | None = None,
        renewed: Callable[[], Holder | None] = lambda: None,
    ) -> None:
        """`renewed`: the holder that this process is now, if it is no longer the one that it was."""
        self._store = store
        self._machine = machine
        self._holder = holder
        self._renewed = renewed
        self._clock = clock
        self._idle_s, self._bytes_max = idle_s, bytes_max
        self._manifests = Manifests(store)
        self._entries: OrderedDict[RunId, _Entry[State]] = OrderedDict()
        self._claims = itertools.count(1)
        self._leaving = False
        self._lives = 0  # a slice of an earlier one ends after the operation under way

    @property
    def loaded(self) -> int:
        """The number of runs whose state is in memory."""
        return sum(entry.run is not None for entry in self._entries.values())

    def leave(self) -> None:
        """This process is about to end: slices end after the operation under way, and doorbells are refused."""
        self._leaving = True

    async def quiesce(self) -> None:
        """As `leave`; then drop every claim and every state, with a snapshot where it is worth its bytes."""
        self.leave()
        for entry in list(self._entries.values()):
            async with entry.lock:
                if entry.idle_timer is not None:
                    entry.idle_timer.cancel()
                if entry.background is not None:
                    await asyncio.gather(entry.background, return_exceptions=True)
                if entry.run is not None:
                    await self._snapshot_if_worth(entry.run, entry)
                entry.run = None

    def resume(self, holder: Holder) -> None:
        """Go on as another process: nothing is claimed any more, and what was read before counts for nothing."""
        self._holder, self._manifests = holder, Manifests(self._store)
        self._lives += 1
        for entry in self._entries.values():
            entry.run = None
        self._leaving = False

    async def _snapshot_if_worth(self, run: Run[State], entry: _Entry[State]) -> None:
        try:
            await self._snapshot(run, entry, lambda: run.worth_snapshot)
        except KnapperError as error:  # whoever claims it replays more
            log.warning("snapshot failed", run=run.run, code=error.code, reason=str(error))

    async def answer(self, run_id: RunId, hint: Hint | None = None) -> AsyncIterator[Frame]:
        """Work on the run for a slice. `hint`: the holder that the gateway knows of; without one, claim the run anyway.

        Yields each commit as it becomes durable. Raises KnapperError; unless it is a UserError, ring again.

        If the caller hangs up, the operation under way is finished all the same, and its commit is in the store.
        """
        if (holder := self._renewed()) is not None:
            log.warning("this process is a copy, or slept: it claims anew", before=self._holder.name, now=holder.name)
            self.resume(holder)
        entry = self._entry(run_id)
        await entry.lock.acquire()
        try:
            if entry.idle_timer is not None:
                entry.idle_timer.cancel()
            if self._leaving:
                raise NotHolder(f"{self._holder.name} is leaving, and works on {run_id} no more")
            run = await self._claimed(run_id, entry, hint)
            age_s = metrics.process_age_s() or 0.0
            claimed = Claimed(
                epoch=run.epoch, holder=run.holder.name, address=run.holder.address, age_s=age_s, out=run.out,
                stages=metrics.stages(),
            )  # fmt: skip
            async with aclosing(self._slice(run, entry, claimed)) as frames:
                async for frame in frames:
                    yield frame
        except Unavailable as error:
            # The claim stays for the next doorbell: it counts consecutive failures.
            log.warning("slice broken off", run=run_id, code=error.code, reason=str(error))
            raise
        except KnapperError as error:
            log.warning("run dropped from memory", run=run_id, code=error.code, reason=str(error))
            entry.run = None
            raise
        finally:
            # No await here: the task of a caller that hung up is cancelled again at every await, and releasing the lock
            # before the work has ended would let two slices work on one run.
            if entry.work is None or entry.work.done():
                entry.lock.release()
            else:
                entry.work.add_done_callback(lambda work: _release(entry.lock, work))
            self._unload_later(entry)
            self._evict(run_id)  # a run has its size only once it is restored, and grows by its pending gradients

    def _entry(self, run: RunId) -> _Entry[State]:
        entry = self._entries.setdefault(run, _Entry())
        self._entries.move_to_end(run)
        self._evict(run)
        return entry

    def _evict(self, kept: RunId) -> None:
        """Drop the least recently used runs that nobody works on, down to the number and the bytes that may stay."""
        for other, entry in list(self._entries.items()):
            if len(self._entries) <= _RUNS_MAX and (self._bytes_max is None or self._bytes <= self._bytes_max):
                break
            if not entry.lock.locked() and other != kept:
                del self._entries[other]

    @property
    def _bytes(self) -> int:
        return sum(entry.run.state_bytes for entry in self._entries.values() if entry.run is not None)

    async def _claimed(self, run: RunId, entry: _Entry[State], hint: Hint | None) -> Run[State]:
        if entry.run is not None and hint is not None and hint.epoch > entry.run.epoch:
            log.warning("run dropped from memory", run=run, reason=f"{hint.holder} claimed it at epoch {hint.epoch}")
            entry.run = None
        if entry.run is None:
            if hint is not None and self._holder.address:
                await claims.expect_free(self._store, run, self._holder, hint, self._clock(), self._manifests)
            began = self._clock()
            holder = replace(self._holder, name=f"{self._holder.name}/{next(self._claims)}")
            entry.run = await Run.claim(self._store, run, self._machine, holder, self._clock, self._manifests)
            metrics.replayed_seconds.inc(entry.run.replay_cost_s)
            write = log.info if entry.run.epoch > 1 else log.debug  # a new run is no news
            write(
                "run restored", run=run, epoch=entry.run.epoch, applied=entry.run.applied,
                replayed_s=round(entry.run.replay_cost_s, 2), took_s=round(self._clock() - began, 2),
            )  # fmt: skip
            if entry.run.terms_before is not None:
                log.warning(
                    "claimed on other terms: what is replayed may differ in its last bits; published results stay",
                    run=run,
                    before=msgspec.structs.asdict(entry.run.terms_before),
                    now=msgspec.structs.asdict(self._holder.terms),
                )
        return entry.run

    async def _slice(self, run: Run[State], entry: _Entry[State], claimed: Claimed) -> AsyncGenerator[Frame]:
        """Yields the claim, while the work already begins; then the commits; then the end."""
        now = asyncio.get_running_loop().time  # monotonic, so that a slice keeps its length
        end, life = now() + limits.slice_s, self._lives

        def over() -> bool:
            return self._leaving or self._lives != life or now() >= end

        committed: asyncio.Queue[Frame | None] = asyncio.Queue()

        async def publish(n: int, commit: Commit) -> None:
            committed.put_nowait(Committed(n=n, commit=commit))
            if run.wants_snapshot:
                self._snapshot_in_background(run, entry)

        async def work() -> bool:
            try:
                while not over():
                    if run.must_snapshot:
                        await self._snapshot(run, entry, lambda: run.must_snapshot)
                    if not await run.apply_pending(over, publish):
                        return False
                return True
            finally:
                committed.put_nowait(None)

        task = entry.work = asyncio.ensure_future(work())
        try:
            yield claimed
            while (frame := await committed.get()) is not None:
                yield frame
            more = await asyncio.shield(task)
        finally:
            end = now()  # if the caller hung up: finish the operation under way, then `answer` releases the lock
        yield Done(applied=run.applied, more=more)

    async def _snapshot(self, run: Run[State], entry: _Entry[State], wanted: Callable[[], bool]) -> None:
        """Take a snapshot, unless another made it needless meanwhile; and delete those that it supersedes."""
        async with entry.snapshots:
            if not wanted():
                return
            began = self._clock()
            await run.snapshot()
            log.debug("snapshot", run=run.run, applied=run.applied, took_s=round(self._clock() - began, 2))
            try:
                await journal.snapshots(self._store, run.run, run.manifest)
            except StoreError as error:
                log.debug("superseded snapshots are left to the gateway", run=run.run, reason=str(error))

    def _snapshot_in_background(self, run: Run[State], entry: _Entry[State]) -> None:
        if entry.snapshots.locked():
            return

        async def snapshot() -> None:
            try:
                await self._snapshot(run, entry, lambda: run.wants_snapshot)
            except KnapperError as error:
                log.warning("snapshot failed", run=run.run, code=error.code, reason=str(error))
                if entry.run is run:
                    entry.run = None  # the next doorbell claims the run again

        entry.background = asyncio.ensure_future(snapshot())

    def _unload_later(self, entry: _Entry[State]) -> None:
        if entry.idle_timer is not None:
            entry.idle_timer.cancel()
        if self._idle_s > 0:
            entry.idle_timer = asyncio.get_running_loop().call_later(self._idle_s, self._unload, entry)

    def _unload(self, entry: _Entry[State]) -> None:
        """Unload an idle run, with a snapshot if replaying would cost more than storing it.

        The next doorbell claims it again and restores it bit by bit.
        """
        run, timer = entry.run, entry.idle_timer
        if run is None:
            return
        if _busy(entry) or entry.snapshots.locked():
            self._unload_later(entry)
            return

        async def unload() -> None:
            try:
                await self._snapshot(run, entry, lambda: run.worth_snapshot)
            except KnapperError as error:
                log.warning("snapshot failed", run=run.run, code=error.code, reason=str(error))
                if isinstance(error, Unavailable):
                    self._unload_later(entry)
                    return
            # No await from here on: a doorbell that came meanwhile keeps the run.
            if entry.run is run and entry.idle_timer is timer and not _busy(entry):
                entry.run = None
                log.debug("run unloaded: it was idle", run=run.run, applied=run.applied)

        entry.background = asyncio.ensure_future(unload())


def _busy(entry: _Entry[Any]) -> bool:
    return entry.lock.locked() or (entry.work is not None and not entry.work.done())


def _release(lock: asyncio.Lock, work: asyncio.Task[bool]) -> None:
    """Ends a slice whose caller hung up. The next doorbell meets the same error again."""
    if not work.cancelled() and (error := work.exception()) is not None:
        log.warning("a slice that nobody reads broke off", reason=str(error))
    lock.release()
