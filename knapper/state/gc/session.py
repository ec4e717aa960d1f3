"""A visit to one session: deletes the garbage of its runs, samplers and checkpoints."""

from math import inf

from knapper.ids import RunId, SamplerId, SessionId, session_of
from knapper.state import checkpoint_index, damage, layout
from knapper.state.checkpoint_index import CheckpointEntry
from knapper.state.gc import journal, marks
from knapper.state.gc.lookups import Memory, Need, SharedLookups, VisitResult
from knapper.state.journal import bundles, ends
from knapper.state.journal.newest import newest_name
from knapper.state.journal.records import Commit, End, Manifest, Operation, decode
from knapper.state.layout import ObjectKind
from knapper.state.sessions import Sampler, Session
from knapper.store import Store, many

_HELD_S = 24 * 3600.0  # the next look at files that only other sessions refer to
_FENCES_MAX = 16  # read on the way back to the newest result: one a claim


class Visit:
    """A visit to one session. `runs`: known runs of it, besides those that the store lists."""

    def __init__(self, memory: Memory, session: SessionId, shared: SharedLookups, runs: set[RunId]) -> None:
        self.result = VisitResult()
        self._memory, self._store, self._keep = memory, memory.store, memory.retention
        self._session, self._shared, self._runs = session, shared, runs
        self._record: Session | None = None
        self._tenant = ""
        self._over: float | None = None  # when the session ended
        self._ended: set[RunId] = set()
        self._bundles: set[str] = set()
        self._superseded: list[CheckpointEntry] = []  # versions of checkpoints' names
        self._named: set[str] = set()  # bundles that a version of a checkpoint refers to
        self._holding: set[str] = set()  # bundles that samplers and living checkpoints of the session refer to

    async def go(self) -> VisitResult:
        """Delete the session's garbage."""
        await self._begin()
        for run in sorted(self._runs):
            await self._run(run)
        if self._bundles or self._over is not None:
            await self._samplers()
            await self._names()
            await self._orphans()
            await self._versions_before()
        if self._over is not None:
            await self._forget()
        elif self._record is not None or self._runs or self._holding:
            self.result.left = True  # a living session may still make garbage
        return self.result

    async def _begin(self) -> None:
        """Find runs and files. Files are listed before their names are, so that no name is missed."""
        names = await self._store.list(layout.exports_of(self._session))
        self._bundles = set(map(layout.bundle_of, names))
        self._runs |= {layout.run_of_export(prefix) for prefix in self._bundles}
        self._over = await self._memory.sessions.over_since(self._session, self._memory.clock())
        self.result.over = self._over is not None
        self._record = await self._memory.sessions.find(self._session)
        if self._record is not None:
            self._tenant = self._record.tenant
            self._runs |= set(await self._memory.register.runs(self._tenant, self._record))
        elif self._runs:
            creation = await self._memory.acceptor.creation(min(self._runs))
            self._tenant = "" if creation is None else creation.spec.tenant

    # -- runs --------------------------------------------------------------------------------------------------------

    async def _run(self, run: RunId) -> None:
        if (end := await ends.ended(self._store, run)) is not None:
            await self._after_end(run, end)
            return
        newest = await self._memory.manifests.newest(run)
        if newest is not None:
            await self._snapshots(run, *newest)
            await self._answers(run, newest[1])
        elif len(await self._store.list(layout.operations(run), limit=2)) < 2:
            return  # only its creation exists
        await self._finish(run, newest[1].claimed_at if newest else 0.0)

    async def _snapshots(self, run: RunId, n: int, manifest: Manifest) -> None:
        stored = await journal.snapshots(self._store, run, manifest)
        self.result.deleted += stored.deleted
        for prefix in stored.unfinished:
            if self._has_waited(prefix):
                await journal.release(self._store, run, n, manifest)
                self.result.wait(0.0)

    async def _answers(self, run: RunId, manifest: Manifest) -> None:
        if not manifest.snapshot_before:
            return
        now, need = self._memory.clock(), await self._need(run)
        collected = await journal.records(
            self._store, run, manifest, now=now, keep_s=self._keep.results_s, needed=need.seq,
            after=self._memory.out.get(run, 0), first=lambda: self._memory.account(self._tenant, run),
        )  # fmt: skip
        self._memory.out[run] = collected.out
        self.result.deleted += collected.count
        if collected.next_at < inf:
            self.result.wait(collected.next_at - now)

    async def _finish(self, run: RunId, claimed_at: float) -> None:
        """End a run whose session was over long ago, and that had no operation since."""
        if self._over is None:
            return
        now, at = self._memory.clock(), self._over + self._keep.finished_s
        asked_at = 0.0
        if at <= now:
            asked_at = await last_accepted_at(self._store, run)
            at = max(self._over, claimed_at, asked_at) + self._keep.finished_s
        if at <= now and (await self._need(run)).running:
            at = now + _HELD_S
        if at > now:
            self.result.wait(at - now)
            return
        request = End(reason="finished", tenant=self._tenant, at=now, asked_at=asked_at)
        await self._memory.account(self._tenant, run)
        await self._after_end(run, await ends.end(self._store, run, request))

    async def _need(self, run: RunId) -> Need:
        return Need() if self._record is None else await self._memory.need(self._record, run)

    async def _after_end(self, run: RunId, end: End) -> None:
        self._ended.add(run)
        self._memory.out.pop(run, None)
        if end.reason == "deleted":
            await self.deleted_run(run, end.tenant)
        else:
            self.result.deleted += await journal.remains(self._store, run, keep_creation=True)
        left_s = end.at + self._keep.orphans_s - self._memory.clock()
        if left_s > 0:
            self.result.wait(left_s)  # once more: a process may have been writing as the run ended

    async def deleted_run(self, run: RunId, tenant: str) -> None:
        """Delete all objects of a run that its tenant, or the operator, has deleted."""
        by_name = await self._memory.checkpoints.versions(tenant, f"{run}/")
        versions = [version for versions in by_name for version in versions]
        for bundle in {version.bundle for version in versions} - {""}:  # a copy shares its source's files
            await self._mark_owner(bundle, f"{run}-deleted")
        self.result.deleted += await checkpoint_index.remove(self._store, versions)
        doomed = await self._store.list(ObjectKind.INFLIGHT.under(run))
        names = await self._store.list(layout.samplers_of(self._session))
        for sampler in await damage.readable(names, self._memory.sampler):
            if sampler is not None and sampler.run == run:
                await self._drop(sampler)
        self.result.deleted += await journal.delete(self._store, doomed)
        stored = set(map(layout.bundle_of, await self._store.list(layout.exports(run))))
        self._bundles -= stored
        held = await SharedLookups(self._memory).held(stored) if stored else frozenset[str]()
        for prefix in stored - held:
            await self._delete_bundle(prefix)
        if stored & held:
            self.result.wait(_HELD_S)
        self.result.deleted += await journal.remains(self._store, run, keep_creation=False)
        if (record := self._record or await self._memory.sessions.find(self._session)) is not None:
            await self._memory.register.remove_run(record, run)

    # -- samplers ----------------------------------------------------------------------------------------------------

    async def _samplers(self) -> None:
        """In a living session, samplers of checkpoints stay, and of each run the newest unnamed one of each kind."""
        names = await self._store.list(layout.samplers_of(self._session))
        samplers = [sampler for sampler in await many.each(names, self._memory.sampler) if sampler is not None]
        newest: dict[tuple[str, str], int] = {}
        for sampler in samplers:
            newest[sampler.run, sampler.kind] = max(sampler.seq, newest.get((sampler.run, sampler.kind), 0))
        elsewhere: dict[str, float] | None = None  # asked for once something is to be deleted
        for sampler in samplers:
            is_old = sampler.run != "" and sampler.seq < newest[sampler.run, sampler.kind]
            superseded = self._over is not None or is_old
            left_s = self._grace_left_s(sampler) if superseded else inf
            if left_s <= 0:
                if elsewhere is None:
                    elsewhere = await self._memory.uses.left_elsewhere(self._session)
                left_s = max(elsewhere.get(sampler.sampler, 0.0), elsewhere.get("", 0.0))
            if left_s <= 0:
                await self._drop(sampler)
                continue
            self._holding.add(sampler.bundle)
            if superseded:
                self.result.wait(left_s)

    def _grace_left_s(self, sampler: Sampler) -> float:
        """How long the sampler must still be unused before it may go."""
        if self._shared.at_once:  # a sweep, which does not know what is in use
            return inf if self._over is None else self._over + self._keep.samplers_s - self._memory.clock()
        return self._memory.uses.left_s(SamplerId(sampler.sampler))

    async def _drop(self, sampler: Sampler) -> None:
        """Delete the record, and its weights if they have no name: nothing else refers to those."""
        self.result.deleted += await self._memory.samplers.delete(sampler)
        self._memory.uses.forget(SamplerId(sampler.sampler))
        self._memory.records.forget(ObjectKind.SAMPLER.key(sampler.sampler))
        if sampler.run and sampler.bundle:
            await self._delete_bundle(sampler.bundle)
        elif sampler.bundle:  # a checkpoint's, whose name may be gone
            await self._mark_owner(sampler.bundle, f"{sampler.sampler}-gone")

    async def _mark_owner(self, bundle: str, event: str) -> None:
        """Mark the session that owns the bundle, which has lost a reference."""
        session = session_of(layout.run_of_export(bundle))
        if session != self._session:
            await marks.put(self._store, session, event)
            self.result.others.add(session)

    # -- checkpoints, and files --------------------------------------------------------------------------------------

    async def _names(self) -> None:
        """Find the bundles of the session's checkpoints; the newest version of each name counts."""
        if not self._tenant:
            return
        now = self._memory.clock()
        for first, *later in await self._memory.checkpoints.versions(self._tenant, f"{self._session}:"):
            newest = later[-1] if later else first
            if newest.lives(now):
                self._holding.add(newest.bundle)
                if newest.expires_at:
                    self.result.wait(newest.expires_at - now)
            self._named |= {version.bundle for version in (first, *later)}
            self._superseded += [version for version in later[:-1] if version.bundle != newest.bundle]
            same = [version for version in later[:-1] if version.bundle == newest.bundle]
            self.result.deleted += await checkpoint_index.remove(self._store, same)

    async def _orphans(self) -> None:
        """Delete unreferenced files, except those of an unanswered save, which have no name yet."""
        for prefix in sorted(self._bundles - self._holding):
            run = layout.run_of_export(prefix)
            seq, _ = layout.parse_bundle(prefix)
            saving = prefix not in self._named and run not in self._ended
            if saving and seq > await self._applied(run):
                continue
            if await self._shared.held([prefix]):
                self._memory.since.pop(prefix, None)
                self.result.wait(_HELD_S)
            elif self._shared.at_once or self._has_waited(prefix):
                await self._delete_bundle(prefix)

    async def _versions_before(self) -> None:
        """Delete the versions of a name between the first and the newest, after their files.

        The newest stays, living or not: a process that slept during its save must find it. So does the first, whose
        number every save tries first.
        """
        doomed = [version for version in self._superseded if version.bundle not in self._bundles]
        self.result.deleted += await checkpoint_index.remove(self._store, doomed)

    async def _applied(self, run: RunId) -> int:
        """The newest answered operation, or an earlier one if many claims without a commit came after it."""
        newest = await self._memory.manifests.newest(run)
        if newest is None:
            return -1
        manifest = newest[1]
        last = await newest_name(self._store, layout.commits(run), after=manifest.snapshot_out)
        n = layout.last_number(last) if last else 0
        for back in range(min(n - manifest.snapshot_out, _FENCES_MAX)):
            name = layout.commit(run, n - back)
            data = await self._store.get(name)
            if data is not None and (results := decode(data, Commit, name).results):
                return results[-1].seq
        return manifest.snapshot_seq

    def _has_waited(self, prefix: str) -> bool:
        """Whether it was unreferenced for the grace period."""
        now = self._memory.now()
        left_s = self._memory.since.setdefault(prefix, now) + self._keep.orphans_s - now
        if left_s > 0:
            self.result.wait(left_s)
        return left_s <= 0

    async def _delete_bundle(self, prefix: str) -> None:
        await bundles.delete(self._store, prefix)
        self._bundles.discard(prefix)
        self._memory.since.pop(prefix, None)
        self.result.deleted += 1

    # -- the session -------------------------------------------------------------------------------------------------

    async def _forget(self) -> None:
        """Delete the records of a session that was over long ago, once it has nothing else."""
        assert self._over is not None, "a living session keeps everything"
        left_s = self._over + self._keep.records_s - self._memory.clock()
        if left_s > 0:
            self.result.wait(left_s)
        elif not self.result.left and not self._holding and not self._bundles:
            doomed = [name for run in self._runs for name in await self._store.list(layout.run_prefix(run))]
            if self._tenant:
                for kind in (ObjectKind.CHECKPOINT, ObjectKind.LABEL):
                    doomed += await self._store.list(f"{kind.under(self._tenant)}{self._session}:")
            self.result.deleted += await journal.delete(self._store, doomed)
            if self._record is not None:
                for run in self._runs:
                    await self._memory.register.remove_run(self._record, run)
                await self._memory.register.remove_session(self._record)
                self.result.deleted += await self._memory.sessions.delete(self._session)


async def last_accepted_at(store: Store, run: RunId) -> float:
    """When the newest operation was accepted, or 0."""
    name = await newest_name(store, layout.operations(run))
    data = await store.get(name) if name else None
    return 0.0 if data is None else decode(data, Operation, name).accepted_at
