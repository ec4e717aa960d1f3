"""The holder's half of the journal: claim a run, apply its operations in order, commit. Safe to kill at any line.

No clock and no lock is involved. `out/<n>` can be created once, and a claim first puts a fence into the next slot, so
an earlier holder that is still alive loses the slot it needs and finds a higher epoch there.

The store is waited for beside the device: while an operation is applied, the next is read and the results before it are
being stored.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic

from knapper.concurrency.tasks import Spawn, spawn
from knapper.errors import Corrupt, Fenced, NotFound, OutOfMemory, Unavailable
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal import bundles, ends
from knapper.state.journal.accept import decode_creation
from knapper.state.journal.apply import Applier
from knapper.state.journal.exports import Saves
from knapper.state.journal.holder import Holder, expect_dtype
from knapper.state.journal.machine import Machine, Outcome, State
from knapper.state.journal.newest import Manifests, newest_name
from knapper.state.journal.operations import Operations
from knapper.state.journal.outbox import Outbox, Point, Publish
from knapper.state.journal.own_objects import OwnObjects
from knapper.state.journal.records import SAVES, Commit, Creation, Manifest, Operation, Result, Terms, decode, encode
from knapper.state.journal.replay import Replay, SnapshotBudget
from knapper.store import Store

_STATELESS = SAVES | {"tombstone"}  # they do not change the state


@contextmanager
def _out_of_memory_is_unavailable(run: RunId) -> Iterator[None]:
    """Out of memory outside an operation is not the user's mistake: raise Unavailable, so that it is retried."""
    try:
        yield
    except OutOfMemory as error:
        raise Unavailable(f"no memory for {run} now: {error}", retry_after_s=5.0) from error


class Run(Generic[State]):
    """A claimed run. Any method may raise Fenced (then drop the object) or StoreError (then call again, or drop it)."""

    def __init__(
        self,
        store: Store,
        run: RunId,
        machine: Machine[State],
        holder: Holder,
        clock: Callable[[], float],
        manifests: Manifests,
        spawn: Spawn,
    ) -> None:  # use `claim`
        self.run = run
        self.holder = holder
        self.epoch = 0
        self.applied = -1  # the newest operation in `state`
        self.creation: Creation
        self.terms_before: Terms | None = None  # of the claim before this one, if they differ
        self._state: State | None = None
        self._replay = Replay()  # since the snapshot that this claim began with
        self._spared = Replay()  # of that, what is in a newer one
        self._budget = SnapshotBudget()
        self._outbox: Outbox[State]
        self._store = store
        self._objects = OwnObjects(store)
        self._operations = Operations(store, run, spawn)
        self._machine = machine
        self._clock = clock
        self._applier: Applier[State]
        self._manifests = manifests
        self._manifest: Manifest
        self._manifest_n = 0
        self._out = 0  # the newest out record, written or adopted, up to the fence
        self._entered = False  # `apply_pending` is running

    # -- claim ---------------------------------------------------------------------------------------------------------

    @classmethod
    async def claim(
        cls,
        store: Store,
        run: RunId,
        machine: Machine[State],
        holder: Holder,
        clock: Callable[[], float],
        manifests: Manifests | None = None,
        spawn: Spawn = spawn,
    ) -> "Run[State]":
        """Take the run over from its holder. On return its state is current and every earlier holder is fenced.

        `manifests`: the process's cache, which spares it a search from the beginning. `spawn` starts what goes on
        beside the operations.

        Raises NotFound if the run does not exist or has ended, Fenced if another process claims it at this moment,
        OtherDtype if it was created in another dtype; in that case nothing was written, and its holder keeps it.
        """
        self = cls(store, run, machine, holder, clock, manifests or Manifests(store), spawn)
        data = await store.get(layout.operation(run, 0))
        if data is None:
            if (end := await ends.ended(store, run)) is not None:
                raise ends.refusal(run, end)
            raise NotFound(f"training run {run!r} does not exist; create one with create_lora_training_client")
        self.creation = decode_creation(decode(data, Operation, layout.operation(run, 0)))
        self._applier = Applier(store, run, self.creation, machine, Saves(store, clock))
        await self._take_manifest()
        if (end := await ends.ended(store, run)) is not None:
            raise ends.refusal(run, end)
        try:
            with _out_of_memory_is_unavailable(run):
                await self._recover()
            await self._fence()
        except Corrupt as error:
            await self._expect_newest(error)
            raise
        await self._expect_newest()
        self._outbox = Outbox(run, self.epoch, self._out, self._point(), self._objects, clock, spawn)
        return self

    async def _expect_newest(self, error: Corrupt | None = None) -> None:
        """Raises Fenced if a claim or snapshot came after our manifest: the number after it is then taken, for ever.

        In that case records may be missing, and our fence may have taken the slot of a collected one: neither counts.
        """
        if await self._store.get(layout.manifest(self.run, self._manifest_n + 1)) is not None:
            raise Fenced(f"{self.run} went on without this claim, of epoch {self.epoch}") from error

    async def _take_manifest(self) -> None:
        newest = await self._manifests.newest(self.run)
        n, before = newest if newest else (0, None)
        if before is not None:
            expect_dtype(self.run, before.terms, self.holder.terms)
        first = Manifest(epoch=0, holder="", address="", terms=self.holder.terms, claimed_at=0.0)
        holder = self.holder
        manifest = (before or first).claimed(holder.name, holder.address, holder.terms, self._clock())
        await self._put_manifest(n + 1, manifest)
        self.epoch = manifest.epoch
        if before is not None and before.terms != manifest.terms:
            self.terms_before = before.terms

    async def _put_manifest(self, n: int, manifest: Manifest) -> None:
        if await self._objects.create(layout.manifest(self.run, n), encode(manifest)) is not None:
            raise Fenced(f"another process claimed {self.run} as its manifest {n}")
        self._manifest, self._manifest_n = manifest, n
        self._manifests.remember(self.run, n, manifest)

    async def _recover(self) -> None:
        """Restore the newest snapshot, then replay every committed operation after it, in order."""
        manifest = self._manifest
        if manifest.snapshot:
            try:
                await self._restore(manifest.snapshot, manifest.snapshot_seq, manifest.snapshot_out)
            except Corrupt:
                # The collector keeps all records since the second newest snapshot, so a replay from there is possible.
                # The damaged one leaves the manifest, so that it never becomes the second newest.
                manifest = self._manifest = manifest.without_newest_snapshot()
                if manifest.snapshot:
                    await self._restore(manifest.snapshot, manifest.snapshot_seq, manifest.snapshot_out)
        name = await newest_name(self._store, layout.commits(self.run), after=self._out)
        last = layout.last_number(name) if name else 0
        while self._out < last:  # by number, so that a listing that lags hides none
            name = layout.commit(self.run, self._out + 1)
            data = await self._store.get(name)
            if data is None:
                raise Corrupt(f"{name} is missing, although record {last} of {self.run} exists")
            await self._adopt(decode(data, Commit, name))

    async def _restore(self, prefix: str, seq: int, out: int) -> None:
        _, files = await bundles.read(self._store, prefix)
        self._state = await self._machine.restore(self.creation.spec, files)
        self.applied, self._out = seq, out

    async def _adopt(self, commit: Commit) -> None:
        """Apply a commit that another claim stored."""
        if commit.epoch >= self.epoch:  # of the same epoch: by a copy of this process, as this claim has none yet
            raise Fenced(f"{self.run} was taken over at epoch {commit.epoch}; this claim is of epoch {self.epoch}")
        self._replay = self._replay.grown(record_bytes=sum(len(result.body) for result in commit.results))
        for result in commit.results:
            if result.seq != self.applied + 1:
                raise Corrupt(
                    f"record {self._out + 1} of {self.run} answers operation {result.seq}, after {self.applied}"
                )
            if not result.failed:
                await self._replay_operation(result)
            self.applied = result.seq
        self._out += 1

    async def _replay_operation(self, result: Result) -> None:
        operation = await self._operations.read(result.seq)
        if operation is None or operation.sha256 != result.sha256:
            raise Corrupt(f"operation {result.seq} of {self.run} is not the one that was answered")
        self._replay = self._replay.grown(record_bytes=len(operation.body_zstd))
        if operation.kind not in _STATELESS:
            self._take(await self._applier.step(operation, self._state, result.source), result)

    def _take(self, outcome: Outcome[State], result: Result) -> None:
        """Make the outcome of an operation the current state."""
        loads = bool(result.source) or (result.seq == 0 and bool(self.creation.source))
        self._state = outcome.state
        self._replay = self._replay.grown(outcome.cost_s, loaded=result.seq if loads else -1)

    async def _fence(self) -> None:
        while not await self._put_commit(Commit(epoch=self.epoch, results=[])):
            pass

    async def _put_commit(self, commit: Commit) -> bool:
        """Store the commit in the next slot; False if that had another one, which is adopted."""
        name = layout.commit(self.run, self._out + 1)
        if (stored := await self._objects.create(name, encode(commit))) is not None:
            await self._adopt(decode(stored, Commit, name))
            return False
        self._out += 1
        return True

    # -- apply and commit ----------------------------------------------------------------------------------------------

    async def apply_pending(self, stop: Callable[[], bool], publish: Publish) -> bool:
        """Apply and commit pending operations in order, until none is left, or `stop()`, or a snapshot is due.

        True if operations may still be pending. `publish(n, commit)` is called with each commit once it is durable.
        On return all that was applied is. One call at a time: a second would apply the same operations.
        """
        assert not self._entered, f"two slices are in {self.run} at once"
        self._entered = True
        try:
            return await self._apply_pending(stop, publish)
        finally:
            self._outbox.close()
            self._entered = False

    async def _apply_pending(self, stop: Callable[[], bool], publish: Publish) -> bool:
        await self._outbox.open(publish)
        try:
            more = await self._apply_ahead(stop)
        except Exception:
            await self._outbox.drain()  # one operation's failure is none of those before it
            raise
        await self._outbox.drain()
        return more

    async def _apply_ahead(self, stop: Callable[[], bool]) -> bool:
        """Apply operations while their commits are being stored. False once none waits, and all are durable."""
        while not stop() and not self.must_snapshot and await self._outbox.has_room():
            operation = await self._operations.read(self.applied + 1)
            if operation is None or operation.kind != "optim_step":
                self._outbox.commit()  # a pass's result waits for its step's, which comes at once, and for nothing else
            if operation is not None:
                await self._apply(operation)
            elif not self._outbox.ahead:
                return False
            else:
                await self._outbox.drain()
        return True

    async def _apply(self, operation: Operation) -> None:
        self._operations.read_ahead(operation.seq + 1)
        applied = await self._applier.apply(operation, self._state, self.epoch, self._outbox.drain)
        if applied.outcome is not None:
            self._take(applied.outcome, applied.result)
        self.applied = operation.seq
        self._replay = self._replay.grown(record_bytes=len(operation.body_zstd))
        self._outbox.add(applied.result, applied.outcome.cost_s if applied.outcome is not None else 0.0, self._point())
        if operation.kind != "forward_backward":
            self._outbox.commit()

    def _point(self) -> Point[State]:
        return Point(self.applied, self._state, self._replay)

    # -- snapshot ------------------------------------------------------------------------------------------------------

    @property
    def out(self) -> int:
        """The newest out record known to be stored."""
        return self._outbox.out

    @property
    def ahead(self) -> int:
        """How many results are in memory that no commit has yet."""
        return self._outbox.ahead

    @property
    def state(self) -> State | None:
        """The state after operation `applied`."""
        return self._state

    @property
    def replay_cost_s(self) -> float:
        """Compute seconds since the newest snapshot, which a recovery replays."""
        return self.replay.cost_s

    @property
    def replay(self) -> Replay:
        """What a recovery from the newest snapshot would repeat, once all that was applied is durable."""
        return self._replay.plus(self._outbox.records).without(self._spared)

    @property
    def must_snapshot(self) -> bool:
        """Whether a snapshot must come before the next operation."""
        return self._budget.is_used_up(self.replay, self._manifest.snapshot_seq)

    @property
    def wants_snapshot(self) -> bool:
        """Whether a background snapshot should start now."""
        return self._budget.is_nearly_used_up(self.replay, self._manifest.snapshot_seq, self._serialized_bytes)

    @property
    def worth_snapshot(self) -> bool:
        """Whether to take a snapshot before the run leaves memory."""
        return self._budget.is_worth_one(self.replay, self._manifest.snapshot_seq, self._serialized_bytes)

    @property
    def state_bytes(self) -> int:
        """What its states take in memory, approximately: until a commit is stored, the one before it stays, too."""
        states = {id(state): state for state in (self._state, *self._outbox.states) if state is not None}
        return sum(self._machine.serialized_bytes(state) for state in states.values())

    @property
    def _serialized_bytes(self) -> int:
        return 0 if self._state is None else self._machine.serialized_bytes(self._state)

    async def snapshot(self) -> None:
        """Store the committed state; recoveries then start from it. The collector deletes what that supersedes.

        May run beside `apply_pending`; one at a time.
        """
        stored, out = self._outbox.durable, self._outbox.out
        seq, state = stored.applied, stored.state
        if state is None or seq == self._manifest.snapshot_seq:
            return
        await self._expect_newest()
        await self._expect_no_end()
        began = self._clock()
        with _out_of_memory_is_unavailable(self.run):
            files = await self._machine.serialize(state)
        prefix = layout.snapshot(self.run, seq, self.epoch)
        await bundles.write(self._store, prefix, files, spec=self.creation.spec, seq=seq, epoch=self.epoch)
        manifest = self._manifest.with_snapshot(prefix, seq, out)
        await self._put_manifest(self._manifest_n + 1, manifest)
        await self._expect_no_end(prefix)
        self._budget.storing_s = max(0.0, self._clock() - began)
        self._spared = stored.replay

    async def _expect_no_end(self, written: str = "") -> None:
        """Raises Fenced once the run has ended, and deletes the snapshot `written` meanwhile."""
        creation = layout.operation(self.run, 0)  # the collector deletes it, and the End record after it
        if await ends.ended(self._store, self.run) is not None or await self._store.get(creation) is None:
            if written:
                await bundles.delete(self._store, written)
            raise Fenced(f"{self.run} was ended")

    @property
    def manifest(self) -> Manifest:
        """The newest manifest that this claim knows."""
        return self._manifest

    @property
    def manifest_n(self) -> int:
        """The number of `manifest`."""
        return self._manifest_n
