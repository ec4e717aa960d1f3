"""One look at a session: what is left of its runs, samplers and checkpoints, and what of it may go by now."""

from math import inf

from knapper.ids import RunId, SamplerId, SessionId, session_of
from knapper.state import checkpoint_index, damage, layout
from knapper.state.checkpoint_index import CheckpointEntry
from knapper.state.gc import journal, marks
from knapper.state.gc.lookups import Look, Memory, Need, SharedLookups
from knapper.state.journal import bundles, ends
from knapper.state.journal.newest import newest_name
from knapper.state.journal.records import Commit, End, Manifest, Operation, decode
from knapper.state.layout import ObjectKind
from knapper.state.sessions import Sampler, Session
from knapper.store import Store, many

_HELD_S = 24 * 3600.0  # files that only others need: when they may have let go
_FENCES_MAX = 16  # read on the way back to the newest answer: one a claim


class Visit:
    """A look at one session. `runs`: that are known to be in it, besides those that are found."""

    def __init__(self, memory: Memory, session: SessionId, during: SharedLookups, runs: set[RunId]) -> None:
        self.found = Look()
        self._memory, self._store, self._keep = memory, memory.store, memory.retention
        self._session, self._during, self._runs = session, during, runs
        self._record: Session | None = None
        self._tenant = ""
        self._over: float | None = None  # since when
        self._ended: set[RunId] = set()
        self._bundles: set[str] = set()
        self._overtaken: list[CheckpointEntry] = []  # versions of checkpoints' names
        self._named: set[str] = set()  # bundles that checkpoints lead to, or did
        self._holding: set[str] = set()  # bundles that samplers and living checkpoints of the session lead to

    async def go(self) -> Look:
        """Deletes what may go by now."""
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
            self.found.left = True  # it lives, and may do anything
        return self.found

    async def _begin(self) -> None:
        """Who and what there is. Files are listed before whatever may name them, so that a name is not missed."""
        listed = await self._store.list(layout.exports_of(self._session))
        self._bundles = set(map(layout.bundle_of, listed))
        self._runs |= {layout.run_of_export(prefix) for prefix in self._bundles}
        self._over = await self._memory.sessions.over_since(self._session, self._memory.clock())
        self.found.over = self._over is not None
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
            return  # it was made, and no more than that
        await self._finish(run, newest[1].claimed_at if newest else 0.0)

    async def _snapshots(self, run: RunId, n: int, manifest: Manifest) -> None:
        stored = await journal.snapshots(self._store, run, manifest)
        self.found.deleted += stored.deleted
        for prefix in stored.unfinished:
            if self._has_waited(prefix):
                await journal.release(self._store, run, n, manifest)
                self.found.wait(0.0)

    async def _answers(self, run: RunId, manifest: Manifest) -> None:
        if not manifest.snapshot_before:
            return
        now, need = self._memory.clock(), await self._need(run)
        gone = await journal.records(
            self._store, run, manifest, now=now, keep_s=self._keep.results_s, needed=need.seq,
            after=self._memory.out.get(run, 0), first=lambda: self._memory.account(self._tenant, run),
        )  # fmt: skip
        self._memory.out[run] = gone.out
        self.found.deleted += gone.count
        if gone.next_at < inf:
            self.found.wait(gone.next_at - now)

    async def _finish(self, run: RunId, claimed_at: float) -> None:
        """End a run whose session has been over for long, and that nothing was asked of since."""
        if self._over is None:
            return
        now, at = self._memory.clock(), self._over + self._keep.finished_s
        asked_at = 0.0
        if at <= now:
            asked_at = await asked_of(self._store, run)
            at = max(self._over, claimed_at, asked_at) + self._keep.finished_s
        if at <= now and (await self._need(run)).running:
            at = now + _HELD_S
        if at > now:
            self.found.wait(at - now)
            return
        asked = End(reason="finished", tenant=self._tenant, at=now, asked_at=asked_at)
        await self._memory.account(self._tenant, run)
        await self._after_end(run, await ends.end(self._store, run, asked))

    async def _need(self, run: RunId) -> Need:
        return Need() if self._record is None else await self._memory.need(self._record, run)

    async def _after_end(self, run: RunId, end: End) -> None:
        self._ended.add(run)
        self._memory.out.pop(run, None)
        if end.reason == "deleted":
            await self.deleted_run(run, end.tenant)
        else:
            self.found.deleted += await journal.remains(self._store, run, keep_creation=True)
        left_s = end.at + self._keep.orphans_s - self._memory.clock()
        if left_s > 0:
            self.found.wait(left_s)  # once more: somebody may have been storing something as it ended

    async def deleted_run(self, run: RunId, tenant: str) -> None:
        """Delete whatever is there of a run that its tenant, or the operator, has deleted."""
        versions = [each for named in await self._memory.checkpoints.versions(tenant, f"{run}/") for each in named]
        for bundle in {version.bundle for version in versions} - {""}:  # a copy's files lie where its source's do
            await self._tell(bundle, f"{run}-deleted")
        self.found.deleted += await checkpoint_index.remove(self._store, versions)
        doomed = await self._store.list(ObjectKind.INFLIGHT.under(run))
        listed = await self._store.list(layout.samplers_of(self._session))
        for sampler in await damage.readable(listed, self._memory.sampler):
            if sampler is not None and sampler.run == run:
                await self._drop(sampler)
        self.found.deleted += await journal.delete(self._store, doomed)
        stored = set(map(layout.bundle_of, await self._store.list(layout.exports(run))))
        self._bundles -= stored
        held = await SharedLookups(self._memory).held(stored) if stored else frozenset[str]()
        for prefix in stored - held:
            await self._delete_bundle(prefix)
        if stored & held:
            self.found.wait(_HELD_S)
        self.found.deleted += await journal.remains(self._store, run, keep_creation=False)
        if (record := self._record or await self._memory.sessions.find(self._session)) is not None:
            await self._memory.register.remove_run(record, run)

    # -- samplers ----------------------------------------------------------------------------------------------------

    async def _samplers(self) -> None:
        """Of each run the newest unnamed one of each kind stays while the session lives; so do those of checkpoints."""
        listed = await self._store.list(layout.samplers_of(self._session))
        samplers = [each for each in await many.each(listed, self._memory.sampler) if each is not None]
        newest: dict[tuple[str, str], int] = {}
        for each in samplers:
            newest[each.run, each.kind] = max(each.seq, newest.get((each.run, each.kind), 0))
        for each in samplers:
            spent = self._over is not None or (each.run != "" and each.seq < newest[each.run, each.kind])
            left_s = self._unasked_for(each) if spent else inf
            if left_s <= 0:
                await self._drop(each)
                continue
            self._holding.add(each.bundle)
            if spent:
                self.found.wait(left_s)

    def _unasked_for(self, sampler: Sampler) -> float:
        """How long it still has to be left alone before it may go."""
        if self._during.at_once:  # by somebody who does not know what is asked for
            return inf if self._over is None else self._over + self._keep.samplers_s - self._memory.clock()
        now = self._memory.now()
        return self._memory.asked.setdefault(SamplerId(sampler.sampler), now) + self._keep.samplers_s - now

    async def _drop(self, sampler: Sampler) -> None:
        """The record, and weights that only it can lead to: a save that has no name."""
        self.found.deleted += await self._memory.samplers.delete(sampler)
        self._memory.asked.pop(SamplerId(sampler.sampler), None)
        self._memory.records.forget(ObjectKind.SAMPLER.key(sampler.sampler))
        if sampler.run and sampler.bundle:
            await self._delete_bundle(sampler.bundle)
        elif sampler.bundle:  # a checkpoint's, whose name may be gone
            await self._tell(sampler.bundle, f"{sampler.sampler}-gone")

    async def _tell(self, bundle: str, what: str) -> None:
        """Whoever's files these are: they may be needed no more."""
        session = session_of(layout.run_of_export(bundle))
        if session != self._session:
            await marks.put(self._store, session, what)
            self.found.others.add(session)

    # -- checkpoints, and files --------------------------------------------------------------------------------------

    async def _names(self) -> None:
        """What the checkpoints of the session lead to: the newest version of each name counts."""
        if not self._tenant:
            return
        now = self._memory.clock()
        for first, *later in await self._memory.checkpoints.versions(self._tenant, f"{self._session}:"):
            newest = later[-1] if later else first
            if newest.lives(now):
                self._holding.add(newest.bundle)
                if newest.expires_at:
                    self.found.wait(newest.expires_at - now)
            self._named |= {version.bundle for version in (first, *later)}
            self._overtaken += [version for version in later[:-1] if version.bundle != newest.bundle]
            same = [version for version in later[:-1] if version.bundle == newest.bundle]
            self.found.deleted += await checkpoint_index.remove(self._store, same)

    async def _orphans(self) -> None:
        """Files that nothing leads to any more; or never did, though their operation is answered.

        What is being saved has no name yet.
        """
        for prefix in sorted(self._bundles - self._holding):
            run = layout.run_of_export(prefix)
            seq, _ = layout.parse_bundle(prefix)
            saving = prefix not in self._named and run not in self._ended
            if saving and seq > await self._applied(run):
                continue
            if await self._during.held([prefix]):
                self._memory.since.pop(prefix, None)
                self.found.wait(_HELD_S)
            elif self._during.at_once or self._has_waited(prefix):
                await self._delete_bundle(prefix)

    async def _versions_before(self) -> None:
        """Versions of a name between the first and the newest go after their files.

        The newest stays, dead or alive: it is what a process that slept over its save finds. So does the first: whoever
        saves begins with its number.
        """
        gone = [version for version in self._overtaken if version.bundle not in self._bundles]
        self.found.deleted += await checkpoint_index.remove(self._store, gone)

    async def _applied(self, run: RunId) -> int:
        """An operation that is answered; the newest, but for many claims in a row that did nothing."""
        newest = await self._memory.manifests.newest(run)
        if newest is None:
            return -1
        manifest = newest[1]
        last = await newest_name(self._store, layout.commits(run), after=manifest.snapshot_out)
        n = layout.last_number(last) if last else 0
        for before in range(min(n - manifest.snapshot_out, _FENCES_MAX)):
            name = layout.commit(run, n - before)
            data = await self._store.get(name)
            if data is not None and (results := decode(data, Commit, name).results):
                return results[-1].seq
        return manifest.snapshot_seq

    def _has_waited(self, prefix: str) -> bool:
        """Whether nobody has needed it for the time of grace."""
        now = self._memory.now()
        left_s = self._memory.since.setdefault(prefix, now) + self._keep.orphans_s - now
        if left_s > 0:
            self.found.wait(left_s)
        return left_s <= 0

    async def _delete_bundle(self, prefix: str) -> None:
        await bundles.delete(self._store, prefix)
        self._bundles.discard(prefix)
        self._memory.since.pop(prefix, None)
        self.found.deleted += 1

    # -- the session -------------------------------------------------------------------------------------------------

    async def _forget(self) -> None:
        """The records of one that was over long ago, and that nothing is left of but them."""
        assert self._over is not None, "of one that lives everything stays"
        left_s = self._over + self._keep.records_s - self._memory.clock()
        if left_s > 0:
            self.found.wait(left_s)
        elif not self.found.left and not self._holding and not self._bundles:
            doomed = [name for run in self._runs for name in await self._store.list(layout.run_prefix(run))]
            if self._tenant:
                for kind in (ObjectKind.CHECKPOINT, ObjectKind.LABEL):
                    doomed += await self._store.list(f"{kind.under(self._tenant)}{self._session}:")
            self.found.deleted += await journal.delete(self._store, doomed)
            if self._record is not None:
                for run in self._runs:
                    await self._memory.register.remove_run(self._record, run)
                await self._memory.register.remove_session(self._record)
                self.found.deleted += await self._memory.sessions.delete(self._session)


async def asked_of(store: Store, run: RunId) -> float:
    """When the newest operation was accepted; 0 if there is none."""
    name = await newest_name(store, layout.operations(run))
    data = await store.get(name) if name else None
    return 0.0 if data is None else decode(data, Operation, name).accepted_at
