"""One history: a client's plan, carried out by real journal classes in a hostile world, then held against the
undisturbed run.
"""

import asyncio
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from knapper.errors import Fenced, KnapperError, NotHolder, StoreError, Unavailable
from knapper.events.cloudevents import Hint, Way
from knapper.ids import RunId, session_of
from knapper.serving import claims
from knapper.state import layout
from knapper.state.checkpoints import Checkpoint
from knapper.state.gc import journal
from knapper.state.gc.collector import Collector
from knapper.state.gc.lookups import Retention
from knapper.state.journal import bundles
from knapper.state.journal.accept import Acceptor, newest_manifest, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.machine import Machine
from knapper.state.journal.records import (
    Commit,
    Creation,
    Kind,
    Manifest,
    Operation,
    Result,
    Spec,
    Terms,
    decode,
    encode,
)
from knapper.state.journal.results import GONE, Results
from knapper.state.journal.run import Run
from knapper.state.sessions import Sampler, Session
from knapper.store import Store
from knapper.store.memory import MemoryStore
from tests.sim.ledger import SIZE, LedgerMachine
from tests.sim.world import Process, Thread, World, WorldStore, pause
from tests.store.faulty import FaultyStore, Rates

RUN = RunId("ses-" + "0" * 32 + ":train:0")
SPEC = Spec(
    run=RUN, tenant="local", base_model="ledger", rank=1, alpha=1.0, seed=3,
    train_attn=True, train_mlp=True, train_unembed=True,
)  # fmt: skip
CREATION = Creation(spec=SPEC)
SESSION = session_of(RUN)
TERMS = Terms(device="sim", dtype="float32", threads=1, versions="sim")


@dataclass(frozen=True)
class Step:
    seq: int
    kind: Kind
    body: bytes
    rejected: str = ""  # the gateway turns it into a tombstone


def make_plan(seed: int, length: int) -> list[Step]:
    """A run as clients make them: passes, steps, saves, loads of what was saved, and mistakes."""
    draw = np.random.default_rng(seed)
    plan: list[Step] = []
    saved: list[str] = []
    for seq in range(1, length + 1):
        chance = draw.random()
        if chance < 0.5:
            body = b"wrong" if draw.random() < 0.05 else draw.random(SIZE, np.float32).tobytes()
            plan.append(Step(seq, "forward_backward", body))
        elif chance < 0.75:
            plan.append(Step(seq, "optim_step", b"{}"))
        elif chance < 0.85:
            name = "again" if draw.random() < 0.3 else f"state-{seq}"
            saved.append(name)
            plan.append(Step(seq, "save_weights", _json(model_id=RUN, seq_id=seq, path=name)))
        elif chance < 0.9:
            body = _json(model_id=RUN, seq_id=seq, sampling_session_seq_id=seq)
            plan.append(Step(seq, "save_weights_for_sampler", body))
        elif chance < 0.96:
            name = saved[int(draw.integers(len(saved)))] if saved and draw.random() < 0.9 else "never-saved"
            path, optimizer = f"tinker://{RUN}/weights/{name}", bool(draw.random() < 0.5)
            plan.append(Step(seq, "load_weights", _json(model_id=RUN, seq_id=seq, path=path, optimizer=optimizer)))
        else:
            plan.append(Step(seq, "optim_step", b'{"learning_rate": "high"}', rejected="learning_rate is 'high'"))
    return plan


def _json(**fields: object) -> bytes:
    return msgspec.json.encode(fields)


async def send(acceptor: Acceptor, step: Step) -> None:
    if step.rejected:
        await acceptor.reject(RUN, step.seq, pack(step.body), step.rejected)
    else:
        await acceptor.accept(RUN, step.seq, step.kind, pack(step.body))


@dataclass
class Truth:
    """What the undisturbed run gives."""

    digest: str
    answers: dict[int, bytes]


async def _nothing(_n: int, _commit: Commit) -> None:
    return None


async def digest_of(machine: Machine[Any], run: Run[Any]) -> str:
    """SHA-256 of weights, moments, step count and pending gradients."""
    assert run.state is not None
    files = await machine.serialize(run.state)
    whole = hashlib.sha256()
    for name, data in sorted(files.items()):
        whole.update(name.encode() + bytes(data))
    return whole.hexdigest()


def undisturbed(plan: list[Step], machine: Machine[Any]) -> Truth:
    async def story() -> Truth:
        store = MemoryStore()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for step in plan:
            await send(acceptor, step)
        run = await Run.claim(store, RUN, machine, Holder("h0", "", TERMS), lambda: 0.0)
        while await run.apply_pending(lambda: False, _nothing):
            await run.snapshot()
        results = Results(store)
        answers = {}
        for seq in range(len(plan) + 1):
            result = await results.find(RUN, seq)
            assert result is not None
            answers[seq] = result.body
        return Truth(await digest_of(machine, run), answers)

    return asyncio.run(story())


@dataclass
class History:
    """Carries the plan out under faults.

    `claimants` processes fight for the run; one of them always stays in the end.
    """

    seed: int
    plan: list[Step]
    machine: Machine[Any]
    claimants: int = 2
    faults: int = 30
    run_class: type[Run[Any]] = Run
    rates: Rates | None = None  # of the store's own faults, which never end
    steady: bool = True  # the clock goes on as it should
    observed: bool = True  # every object is seen as it is created, as none is where the power is cut in the middle
    back_off: int = 0  # pauses of the client, at times, before it repeats what failed
    memory: Store = field(default_factory=MemoryStore)  # where the run lies, seen from outside the world
    world: World = field(init=False)
    acked: set[int] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    answers: dict[int, bytes] = field(default_factory=dict)
    collected: int = 0  # looks that found something to delete
    deletions: int = 0  # objects
    takeovers: int = 0  # claims that were completed
    published: set[int] = field(default_factory=set)  # operations whose results a holder has told
    lost_ahead: Counter[int] = field(default_factory=Counter)  # holders that died or were fenced, by results ahead

    def __post_init__(self) -> None:
        self.world = World(self.seed, faults=self.faults)
        self.sound = WorldStore(self.world, self._created, self._deleted, self.memory)
        session = Session(session=SESSION, tenant=SPEC.tenant, created_at=self.world.now)
        asyncio.run(self.sound.memory.put_if_absent(f"sessions/{SESSION}/created", encode(session)))
        draw = random.Random(f"keep {self.seed}")
        results_s, samplers_s, orphans_s = (draw.choice((0.01, 1.0, 5.0)) for _ in range(3))
        self.keep = Retention(results_s, samplers_s, orphans_s, finished_s=1e9, records_s=1e9)
        self.store: Store = self.sound
        if self.rates is not None:
            self.faulty = FaultyStore(self.sound, random.Random(self.seed), self.rates, lambda _s: pause())
            self.store = self.faulty
        self._claims = itertools.count()
        self._fights = 0  # claims that ended another, since the newest commit
        self._epoch = 0  # the highest whose claim was complete
        self._durable = -1  # the newest operation that has a result
        self._at_work: dict[str, Run[Any]] = {}  # by process
        self.world.died = self._note_end

    def carry_out(self) -> None:
        world = self.world
        world.add("client", self._client, mortal=False)
        for n in range(2):
            world.add(f"poller{n}", self._poller)
        for n in range(self.claimants):
            world.add(f"holder{n}", self._holder)
        for n in range(2):
            world.add(f"collector{n}", self._collector)
        with world:
            world.run(lambda: len(self.seen) == len(self.acked) == len(self.plan) + 1)

    # -- the client and its gateways -------------------------------------------------------------------------------

    async def _client(self) -> None:
        """Sends every step until it is acknowledged, a window at a time, in any order within it, some of them twice."""
        await self._until_acked(lambda a: a.create(CREATION, b"create"), 0)
        draw = self.world.draw
        waiting = [step for step in self.plan if step.seq not in self.acked]
        while waiting:
            window = waiting[: draw.randrange(1, 5)]
            for step in draw.sample(window, len(window)):
                await self._until_acked(lambda a, s=step: send(a, s), step.seq)  # type: ignore[misc]
                if draw.random() < 0.2:  # the answer got lost: the client sends it again, for ever the same bytes
                    await self._until_acked(lambda a, s=step: send(a, s), step.seq)  # type: ignore[misc]
            waiting = waiting[len(window) :]
        while True:
            await pause()

    async def _until_acked(self, call: Callable[[Acceptor], Any], seq: int) -> None:
        while True:
            try:
                await call(Acceptor(self.store, self.world.clock))  # any gateway, any time
            except Unavailable:
                for _ in range(self.world.draw.choice((0, self.back_off)) if self.back_off else 0):
                    await pause()
                continue
            self.acked.add(seq)
            return

    async def _poller(self) -> None:
        """Asks for answers as clients do; whatever was seen once must never be seen otherwise."""
        results = Results(self.store)
        while True:
            await pause()
            seq = self.world.draw.randrange(len(self.plan) + 1)
            try:
                result = await results.find(RUN, seq)
            except KnapperError:
                continue
            if result is not None:
                self._see(seq, result)

    def _see(self, seq: int, result: Result) -> None:
        self.seen.add(seq)
        if result.body != GONE:
            self._expect_same(seq, result)

    def _expect_same(self, seq: int, result: Result) -> None:
        known = self.answers.setdefault(seq, result.body)
        assert known == result.body, f"seed {self.seed}: operation {seq} has two answers: {known!r}, {result.body!r}"

    # -- holders ---------------------------------------------------------------------------------------------------

    async def _holder(self) -> None:
        draw = self.world.draw
        assert self.world.turn is not None
        process = self.world.turn
        self._at_work.pop(process.name, None)
        try:
            name = f"pod-{next(self._claims)}"
            await self._expect_free(name)
            holder = Holder(f"{name}/1", f"http://{name}", TERMS)
            run = await self.run_class.claim(
                self.store, RUN, self.machine, holder, self.world.clock, spawn=self.world.spawn
            )
            self._epoch = max(self._epoch, run.epoch)
            self.takeovers += 1
            self._at_work[process.name] = run
            for _ in range(draw.randrange(1, 60)):
                await self._work(run)
                await pause()
        except NotHolder:
            for _ in range(draw.randrange(50)):
                await pause()
        except Fenced:
            self._note_end(process)
            self._fights = min(self._fights + 1, 6)
            for _ in range(draw.randrange(100 * 2**self._fights)):  # who rings backs off while nothing comes of it
                await pause()
        except KnapperError:
            return

    async def _expect_free(self, name: str) -> None:
        """What a pod does when a gateway rings it that has looked some time ago, and may take a living one for dead."""
        draw = self.world.draw
        newest = await newest_manifest(self.store, RUN)
        for _ in range(draw.randrange(30)):
            await pause()
        way: Way = draw.choice(("service", "lost", "lost"))
        hint = Hint() if newest is None else Hint(newest[1].holder, newest[1].epoch, way)
        await claims.expect_free(self.store, RUN, Holder(name, f"http://{name}", TERMS), hint, self.world.now)

    async def _work(self, run: Run[Any]) -> None:
        draw = self.world.draw
        turns, most = itertools.count(), draw.randrange(1, 12)
        beside: list[Thread[None]] = []

        async def publish(n: int, commit: Commit) -> None:
            await self._publish(n, commit)
            if not beside and (run.wants_snapshot or draw.random() < 0.05):
                beside.append(self.world.spawn(self._snapshot(run)))

        try:
            await run.apply_pending(lambda: next(turns) >= most, publish)
            for snapshot in beside:
                await snapshot
            if run.wants_snapshot or draw.random() < 0.05:
                await self._snapshot(run)
        except StoreError:
            for snapshot in beside:
                await snapshot
            if draw.random() < 0.5:  # half of the time the same claim goes on
                raise

    async def _snapshot(self, run: Run[Any]) -> None:
        await run.snapshot()
        await journal.snapshots(self.store, RUN, run.manifest)

    def _note_end(self, process: Process) -> None:
        if (run := self._at_work.pop(process.name, None)) is not None:
            self.lost_ahead[run.ahead] += 1

    async def _publish(self, n: int, commit: Commit) -> None:
        """Invariant 1: a result is told only once its commit is stored."""
        stored = asyncio.run(self.sound.memory.get(layout.commit(RUN, n)))
        assert stored is None or stored == encode(commit), f"seed {self.seed}: record {n} was published as another"
        assert not self.observed or commit.results[-1].seq <= self._durable, (
            f"seed {self.seed}: record {n} was published before it was stored"
        )
        for result in commit.results:
            self.published.add(result.seq)
            self._expect_same(result.seq, result)

    def _created(self, name: str, data: bytes) -> None:
        """Invariant 4: once a claim is complete, no earlier one can write a commit. Invariant 3: commits are in order.

        And a save names nothing before the operations that made its state are durable.
        """
        if name.startswith(("checkpoints/", "samplers/")):
            is_checkpoint = name.startswith("checkpoints/")
            saved = decode(data, Checkpoint, name) if is_checkpoint else decode(data, Sampler, name)
            assert not self.observed or saved.seq <= self._durable + 1, (
                f"seed {self.seed}: {name} was named before its state is durable"
            )
        if name.startswith(layout.commits(RUN)):
            commit = decode(data, Commit, name)
            for result in commit.results:
                assert not self.observed or result.seq == self._durable + 1, (
                    f"seed {self.seed}: {name} has the result of {result.seq}"
                )
                self._durable = result.seq
            self._fights = 0 if commit.results else self._fights
            assert not commit.results or commit.epoch >= self._epoch, (
                f"seed {self.seed}: a claim of epoch {commit.epoch} wrote {name} after epoch {self._epoch} was complete"
            )

    def _deleted(self, name: str) -> None:
        """Nothing goes that a recovery starts from, replays or must meet, or that any name leads to.

        Held against what lies in the store at this very moment, whatever the collector has seen of it.
        """
        self.deletions += 1
        memory, where = self.sound.memory, f"seed {self.seed}: {name} is deleted, and"
        newest = asyncio.run(_newest(memory))
        if newest is not None and name.startswith(layout.snapshots(RUN)):
            assert not newest.snapshot or not name.startswith(newest.snapshot), f"{where} recoveries start from it"
            assert not newest.snapshot_before or not name.startswith(newest.snapshot_before), f"{where} is the spare"
            seq, epoch = layout.parse_bundle(name.rpartition("/")[0])
            storing = epoch == newest.epoch and seq > newest.snapshot_seq
            assert not storing, f"{where} its holder is storing it"
        elif name.startswith(layout.manifests(RUN)):
            raise AssertionError(f"{where} a claim that sleeps would find its number free")
        elif name.startswith(layout.commits(RUN)):
            commit = decode(asyncio.run(memory.get(name)) or b"", Commit, name)
            assert commit.results, f"{where} is a fence"
            assert newest is not None, where
            assert layout.last_number(name) <= newest.snapshot_before_out, f"{where} recoveries may replay it"
            old = commit.committed_at + self.keep.results_s <= self.world.now
            assert old or not self.steady, f"{where} was committed just now"
        elif name.startswith(layout.operations(RUN)):
            assert newest is not None, where
            assert 0 < layout.last_number(name) <= newest.snapshot_before_seq, f"{where} recoveries may replay it"
        elif name.startswith("adapters/"):
            led_to_by = asyncio.run(_leading(memory)).get(name.rpartition("/")[0] + "/")
            assert led_to_by is None, f"{where} {led_to_by} leads to it"

    async def _collector(self) -> None:
        """As a gateway does it, which has seen nothing yet; cut off anywhere, beside another and the holders' own."""
        collector = Collector(self.store, self.keep, self.world.clock, self.world.clock)
        for _ in range(self.world.draw.randrange(1, 6)):
            for _ in range(self.world.draw.randrange(100)):
                await pause()
            try:
                self.collected += (await collector.visit(SESSION, RUN)).deleted > 0
            except KnapperError:
                continue

    # -- judgement -------------------------------------------------------------------------------------------------

    def judge(self, truth: Truth) -> None:
        """Final state, every answer, and each operation exactly once. Raises AssertionError with the seed."""
        where = f"seed {self.seed}"
        assert self.acked == set(range(len(self.plan) + 1)), where
        for seq, body in self.answers.items():
            assert body == truth.answers[seq], f"{where}: operation {seq}: {body!r}, undisturbed {truth.answers[seq]!r}"
        for digest in asyncio.run(self._digests()):
            assert digest == truth.digest, f"{where}: the final state differs from the undisturbed run's"
        asyncio.run(self._whole())

    async def _digests(self) -> list[str]:
        """Of the state as it is recovered; and once more, after all that may go has gone."""
        digests = []
        for name in ("judge", "after"):
            run = await self._final(name)
            assert run.applied == len(self.plan), f"seed {self.seed}"
            digests.append(await digest_of(self.machine, run))
            self.world.now += 100.0
            collector = Collector(self.sound.memory, self.keep, lambda: self.world.now, lambda: self.world.now)
            for _ in range(4):
                await collector.visit(SESSION, RUN)
                self.world.now += 100.0
        return digests

    async def _whole(self) -> None:
        """What is left is whole, and no more than it has to be."""
        memory, where = self.sound.memory, f"seed {self.seed}"
        newest = await _newest(memory)
        assert newest is not None
        kept = {prefix for prefix in (newest.snapshot, newest.snapshot_before) if prefix}
        for prefix in kept:
            await bundles.read(memory, prefix)
        assert {name.rpartition("/")[0] + "/" for name in await memory.list(layout.snapshots(RUN))} == kept, where
        leads = await _leading(memory)
        for prefix in leads:
            await bundles.read(memory, prefix)
        assert {name.rpartition("/")[0] + "/" for name in await memory.list("adapters/")} == leads.keys(), where
        assert len(await memory.list("samplers/")) <= 1, f"{where}: a superseded sampler is left"

    async def _final(self, name: str) -> Run[Any]:
        memory: Store = self.sound.memory
        answered: list[int] = []
        for name in await memory.list(layout.commits(RUN)):
            data = await memory.get(name)
            assert data is not None
            answered += [result.seq for result in decode(data, Commit, name).results]
        assert answered, f"seed {self.seed}: no answer is left, and recoveries may replay the newest"
        assert answered == sorted(set(answered)), f"seed {self.seed}: answered {answered}"
        newest = await _newest(memory)
        assert newest is not None
        # Of older ones some may have gone before others: a listing that lagged did not show these to the collector.
        first = newest.snapshot_before_seq + 1 if newest.snapshot_before else answered[0]
        recent = [seq for seq in answered if seq >= first]
        assert recent == list(range(first, len(self.plan) + 1)), f"seed {self.seed}: answered {answered}"
        for name in await memory.list(layout.operations(RUN)):
            data = await memory.get(name)
            assert data is not None
            decode(data, Operation, name)
        return await Run.claim(memory, RUN, self.machine, Holder(name, "", TERMS), lambda: 0.0)


async def _newest(memory: Store) -> Manifest | None:
    newest = await newest_manifest(memory, RUN)
    return None if newest is None else newest[1]


async def _leading(memory: Store) -> dict[str, str]:
    """Bundles, and what leads to each: the newest version of a checkpoint's name, or a sampler."""
    leads: dict[str, str] = {}
    newest = {name.rpartition("/")[0]: name for name in await memory.list("checkpoints/")}
    for name in newest.values():
        leads[decode(await memory.get(name) or b"", Checkpoint, name).bundle] = name
    for name in await memory.list("samplers/"):
        leads[decode(await memory.get(name) or b"", Sampler, name).bundle] = name
    return leads


def played(
    seed: int,
    *,
    faults: int = 30,
    run_class: type[Run[Any]] = Run,
    machine: Machine[Any] | None = None,
    plan: list[Step] | None = None,
    rates: Rates | None = None,
) -> History:
    """Play and judge the history of one seed."""
    machine = machine or LedgerMachine()
    plan = plan or make_plan(seed, length=12 + seed % 25)
    truth = undisturbed(plan, machine)
    history = History(seed, plan, machine, claimants=1 + seed % 3, faults=faults, run_class=run_class, rates=rates)
    history.carry_out()
    history.judge(truth)
    return history


def play(seed: int, **more: Any) -> World:
    """Play and judge the history of one seed; the world in which it happened."""
    return played(seed, **more).world
