"""The holder's half: claim a run, apply its operations in order, commit. Safe to kill at any line, safe to run twice.

Nothing here rests on a clock or a lock. `out/<n>` can be created once; a claim first puts a fence into the next slot,
so an earlier holder that still lives loses the slot it needs and finds a higher epoch there.
"""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Generic

from knapper import limits
from knapper.errors import (
    Corrupt,
    Fenced,
    NotFound,
    OutOfMemory,
    Unavailable,
)  # fmt: skip
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal import bundles, ends
from knapper.state.journal.accept import decode_creation
from knapper.state.journal.apply import Applier, read_operation
from knapper.state.journal.exports import Saves
from knapper.state.journal.holder import Holder, expect_dtype
from knapper.state.journal.machine import Machine, Outcome, State
from knapper.state.journal.newest import Manifests, newest_name
from knapper.state.journal.records import SAVES, Commit, Creation, Manifest, Operation, Result, Terms, decode, encode
from knapper.state.journal.replay import Replay, SnapshotBudget
from knapper.store import Store

_COMMIT_AFTER_S = 0.05  # results wait no longer than this for others to share their commit

_STATELESS = SAVES | {"tombstone"}  # they leave the state alone

Publish = Callable[[int, Commit], Awaitable[None]]


@contextmanager
def _when_there_is_memory(run: RunId) -> Iterator[None]:
    """Memory that is lacking for what no operation asked for is nobody's mistake: Unavailable, and tried again."""
    try:
        yield
    except OutOfMemory as error:
        raise Unavailable(f"no memory for {run} now: {error}", retry_after_s=5.0) from error


@dataclass(frozen=True)
class _Durable(Generic[State]):
    """What is committed: the newest operation, the newest out record, the state; and what a recovery of it repeats."""

    applied: int = -1
    out: int = 0
    state: State | None = None
    replay: Replay = field(default_factory=Replay)


class Run(Generic[State]):
    """A claimed run. Any method may raise Fenced or StoreError.

    After Fenced, drop the object; after StoreError, call again or drop it.
    """

    def __init__(
        self,
        store: Store,
        run: RunId,
        machine: Machine[State],
        holder: Holder,
        clock: Callable[[], float],
        manifests: Manifests,
    ) -> None:  # use `claim`
        self.run = run
        self.holder = holder
        self.epoch = 0
        self.applied = -1  # the newest operation in `state`
        self._spent_s = 0.0  # compute of the commit that is being made
        self.creation: Creation
        self.terms_before: Terms | None = None  # of the claim before this one, if they were others
        self._state: State | None = None
        self._replay = Replay()  # since the newest snapshot
        self._budget = SnapshotBudget()
        self._durable: _Durable[State] = _Durable()
        self._store = store
        self._machine = machine
        self._clock = clock
        self._applier: Applier[State]
        self._manifests = manifests
        self._manifest: Manifest
        self._manifest_n = 0
        self._out = 0  # the newest out record, ours or adopted
        self._outbox: tuple[int, Commit] | None = None  # applied, and not yet known to be stored
        self._entered = False  # somebody is in `apply_pending`

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
    ) -> "Run[State]":
        """Take the run over, from whoever holds it. On return its state is current and every earlier holder is fenced.

        `manifests`: of a process that claims more than once, and need not search anew for what it has seen.

        Raises NotFound if there is no such run, or none any more, Fenced if somebody else claims it at this moment,
        OtherDtype if it was made in another dtype than the holder's; then nothing was written, and the run is still
        whose it was.
        """
        self = cls(store, run, machine, holder, clock, manifests or Manifests(store))
        data = await store.get(layout.operation(run, 0))
        if data is None:
            if (over := await ends.ended(store, run)) is not None:
                raise ends.refusal(run, over)
            raise NotFound(f"training run {run!r} does not exist; create one with create_lora_training_client")
        self.creation = decode_creation(decode(data, Operation, layout.operation(run, 0)))
        self._applier = Applier(store, run, self.creation, machine, Saves(store, clock))
        await self._take_manifest()
        if (over := await ends.ended(store, run)) is not None:
            raise ends.refusal(run, over)
        try:
            with _when_there_is_memory(run):
                await self._recover()
            await self._fence()
        except Corrupt as error:
            await self._expect_newest(error)
            raise
        await self._expect_newest()
        self._mark_durable()
        return self

    async def _expect_newest(self, error: Corrupt | None = None) -> None:
        """Raises Fenced if a claim or snapshot came after our manifest.

        Then what we read may be gone, and the slot that our fence took one of old, which was collected: neither counts.
        Found by its number, which is never free again.
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
        data = encode(manifest)
        name = layout.manifest(self.run, n)
        if not await self._store.put_if_absent(name, data) and await self._store.get(name) != data:
            raise Fenced(f"another process claimed {self.run} as its manifest {n}")
        self._manifest, self._manifest_n = manifest, n
        self._manifests.saw(self.run, n, manifest)

    async def _recover(self) -> None:
        """Snapshot, then every committed operation after it, in order, each as it was cut when it first ran."""
        manifest = self._manifest
        if manifest.snapshot:
            try:
                await self._restore(manifest.snapshot, manifest.snapshot_seq, manifest.snapshot_out)
            except Corrupt:
                # The collector keeps everything since the second newest snapshot; before there were two, everything.
                # The next snapshot comes after that one: the damaged one is nobody's second newest.
                manifest = self._manifest = manifest.without_newest_snapshot()
                if manifest.snapshot:
                    await self._restore(manifest.snapshot, manifest.snapshot_seq, manifest.snapshot_out)
        name = await newest_name(self._store, layout.commits(self.run), after=self._out)
        last = layout.last_number(name) if name else 0
        while self._out < last:  # by number: what a listing leaves out is read all the same
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
        """Make a stored commit part of the state."""
        if commit.epoch > self.epoch:
            raise Fenced(f"{self.run} was taken over at epoch {commit.epoch}; this claim is of epoch {self.epoch}")
        self._replay = self._replay.grown(record_bytes=sum(len(result.body) for result in commit.results))
        for result in commit.results:
            if result.seq != self.applied + 1:
                raise Corrupt(
                    f"record {self._out + 1} of {self.run} answers operation {result.seq}, after {self.applied}"
                )
            if not result.failed:
                await self._repeat(result)
            self.applied = result.seq
        self._out += 1

    async def _repeat(self, result: Result) -> None:
        operation = await read_operation(self._store, self.run, result.seq)
        if operation is None or operation.sha256 != result.sha256:
            raise Corrupt(f"operation {result.seq} of {self.run} is not the one that was answered")
        self._replay = self._replay.grown(record_bytes=len(operation.body_zstd))
        if operation.kind not in _STATELESS:
            self._take(await self._applier.step(operation, self._state, result.source), result)

    def _take(self, outcome: Outcome[State], result: Result) -> None:
        """What came of an operation becomes part of the state."""
        loads = bool(result.source) or (result.seq == 0 and bool(self.creation.source))
        self._state = outcome.state
        self._replay = self._replay.grown(outcome.cost_s, loaded=result.seq if loads else -1)

    async def _fence(self) -> None:
        while not await self._put_commit(Commit(epoch=self.epoch, results=[])):
            pass

    async def _put_commit(self, commit: Commit) -> bool:
        """True if it is stored in the next slot; False if another was found there, and adopted."""
        name, data = layout.commit(self.run, self._out + 1), encode(commit)
        if not await self._store.put_if_absent(name, data):
            found = await self._store.get(name)
            if found is None:
                raise Fenced(f"{name} was taken and collected: this claim has slept for long")
            if found != data:
                await self._adopt(decode(found, Commit, name))
                return False
        self._out += 1
        return True

    # -- apply and commit ----------------------------------------------------------------------------------------------

    async def apply_pending(self, stop: Callable[[], bool], publish: Publish) -> bool:
        """Apply and commit what waits, in order, until nothing does, or `stop()`, or a snapshot is due.

        True if something may still wait.

        `publish(n, commit)` is called with each commit once it is durable. One call at a time: a second would apply
        what the first is about to commit.
        """
        assert not self._entered, f"two slices are in {self.run} at once"
        self._entered = True
        try:
            return await self._apply_pending(stop, publish)
        finally:
            self._entered = False

    async def _apply_pending(self, stop: Callable[[], bool], publish: Publish) -> bool:
        await self._flush(publish)
        while not stop() and not self.must_snapshot:
            try:
                commit = await self._apply_some(stop)
            except BaseException:
                self._roll_back()
                raise
            if commit is None:
                return False
            self._outbox = (self._out + 1, commit)
            await self._flush(publish)
        return True

    def _roll_back(self) -> None:
        """What was applied and not committed never happened."""
        was = self._durable
        self.applied, self._state = was.applied, was.state
        self._replay = was.replay

    async def _flush(self, publish: Publish) -> None:
        if self._outbox is None:
            return
        n, commit = self._outbox
        data = encode(commit)
        name = layout.commit(self.run, n)
        if not await self._store.put_if_absent(name, data):
            found = await self._store.get(name)
            if found != data:  # after our own fence nobody but a later claim can have this slot
                raise Fenced(f"slot {n} of {self.run} was taken by another claim")
        self._out, self._outbox = n, None
        self._replay = self._replay.grown(record_bytes=len(data))
        self._mark_durable()
        await publish(n, commit)

    def _mark_durable(self) -> None:
        self._durable = _Durable(self.applied, self._out, self._state, self._replay)

    async def _apply_some(self, stop: Callable[[], bool]) -> Commit | None:
        """The next commit: one operation, and those behind it that are quick enough to share it.

        None: nothing waits.
        """
        began, self._spent_s = self._clock(), 0.0
        results: list[Result] = []
        size = 0
        while (operation := await read_operation(self._store, self.run, self.applied + 1)) is not None:
            result = await self._apply(operation)
            results.append(result)
            size += len(result.body)
            late = not 0.0 <= self._clock() - began < _COMMIT_AFTER_S  # also if the clock stepped
            if late or size >= limits.commit_inline_bytes_max or self.must_snapshot or stop():
                break
        if not results:
            return None
        return Commit(epoch=self.epoch, results=results, committed_at=self._clock(), device_s=self._spent_s)

    async def _apply(self, operation: Operation) -> Result:
        applied = await self._applier.apply(operation, self._state, self.epoch)
        if applied.outcome is not None:
            self._take(applied.outcome, applied.result)
            self._spent_s += applied.outcome.cost_s
        self.applied = operation.seq
        self._replay = self._replay.grown(record_bytes=len(operation.body_zstd))
        return applied.result

    # -- snapshot ------------------------------------------------------------------------------------------------------

    @property
    def out(self) -> int:
        """The newest record that is known to be stored."""
        return self._out

    @property
    def state(self) -> State | None:
        """The state after operation `applied`."""
        return self._state

    @property
    def replay_cost_s(self) -> float:
        """Compute since the newest snapshot, which a recovery repeats."""
        return self._replay.cost_s

    @property
    def must_snapshot(self) -> bool:
        """Whether nothing more is applied before a snapshot."""
        return self._budget.is_used_up(self._replay, self._manifest.snapshot_seq)

    @property
    def wants_snapshot(self) -> bool:
        """Whether one should be taken in the background now."""
        return self._budget.is_nearly_used_up(self._replay, self._manifest.snapshot_seq, self._serialized_bytes)

    @property
    def worth_snapshot(self) -> bool:
        """Whether a run that leaves the memory should be stored."""
        if self._state is None or self.applied == self._manifest.snapshot_seq:
            return False
        return self._budget.is_worth_one(self._replay, self._manifest.snapshot_seq, self._serialized_bytes)

    @property
    def _serialized_bytes(self) -> int:
        return 0 if self._state is None else self._machine.serialized_bytes(self._state)

    async def snapshot(self) -> None:
        """Store the committed state, and make recoveries start from it. What that supersedes is the collector's.

        May run while operations go on; one at a time.
        """
        stored = self._durable
        seq, state = stored.applied, stored.state
        if state is None or seq == self._manifest.snapshot_seq:
            return
        await self._expect_newest()
        await self._expect_no_end()
        began = self._clock()
        with _when_there_is_memory(self.run):
            files = await self._machine.serialize(state)
        prefix = layout.snapshot(self.run, seq, self.epoch)
        await bundles.write(self._store, prefix, files, spec=self.creation.spec, seq=seq, epoch=self.epoch)
        manifest = self._manifest.with_snapshot(prefix, seq, stored.out)
        await self._put_manifest(self._manifest_n + 1, manifest)
        await self._expect_no_end(prefix)
        self._budget.storing_s = max(0.0, self._clock() - began)
        self._replay = self._replay.without(stored.replay)
        self._durable = replace(self._durable, replay=self._durable.replay.without(stored.replay))

    async def _expect_no_end(self, written: str = "") -> None:
        """Raises Fenced once the run was ended; a snapshot that was written meanwhile goes again."""
        creation = layout.operation(self.run, 0)  # in the end it goes, and the record of the end after it
        if await ends.ended(self._store, self.run) is not None or await self._store.get(creation) is None:
            if written:
                await bundles.delete(self._store, written)
            raise Fenced(f"{self.run} was ended")

    @property
    def manifest(self) -> Manifest:
        """The newest, as this claim knows it."""
        return self._manifest

    @property
    def manifest_n(self) -> int:
        """The number of that."""
        return self._manifest_n
