"""A run of a small machine, with everything around it: its session, samplers, checkpoints, and a collector."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from knapper import ids
from knapper.ids import RunId, SamplerId, SessionId
from knapper.state.checkpoints import Checkpoints
from knapper.state.gc import journal
from knapper.state.gc.collector import Collector
from knapper.state.gc.lookups import Retention
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, Creation, Kind, Spec
from knapper.state.journal.run import Run
from knapper.state.sessions import Finish, Samplers, Session, Sessions
from knapper.state.tenant_index import Register
from knapper.store import Store
from knapper.store.memory import MemoryStore
from tests.sim.history import TERMS
from tests.sim.ledger import SIZE, LedgerMachine

KEEP = Retention(results_s=60.0, samplers_s=60.0, orphans_s=600.0, finished_s=7200.0, records_s=86400.0)
DAY_S = 86400.0


@dataclass
class Clock:
    at: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.at


@dataclass
class Bench:
    """`samplers`: unnamed ones that were saved. Each answer is as its client gets it."""

    store: Store = field(default_factory=MemoryStore)
    clock: Clock = field(default_factory=Clock)
    keep: Retention = KEEP
    tenant: str = "local"
    number: int = 0
    machine: LedgerMachine = field(default_factory=LedgerMachine)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    seq: int = 0
    samplers: int = 0

    def __post_init__(self) -> None:
        self.session = SessionId(f"ses-{self.number:032x}")
        self.run = ids.make_run_id(self.session, 0)
        self.acceptor = Acceptor(self.store, self.clock)
        self.checkpoints = Checkpoints(self.store, self.clock)
        self.collector = self.collector_of("first")
        self.held: Run[Any]

    def collector_of(self, gateway: str) -> Collector:
        return Collector(self.store, self.keep, self.clock, self.clock, gateway=gateway)

    def spec(self, run: RunId) -> Spec:
        return Spec(
            run=run, tenant=self.tenant, base_model="ledger", rank=1, alpha=1.0, seed=3, train_attn=True,
            train_mlp=True, train_unembed=True,
        )  # fmt: skip

    async def begin(self, *, tags: list[str] | None = None) -> None:
        """As a gateway makes the session and the run, and a holder claims it."""
        record = Session(session=self.session, tenant=self.tenant, created_at=self.clock.at, tags=tags or [])
        await Register(self.store).add_session(record)
        await Sessions(self.store).create(record)
        await Register(self.store).add_run(record, self.run)
        await self.acceptor.create(Creation(spec=self.spec(self.run)), b"create")
        await self.claim("first")

    async def claim(self, name: str) -> None:
        self.held = await Run.claim(self.store, self.run, self.machine, Holder(name, "", TERMS), self.clock)

    async def apply(self, kind: Kind, /, **asked: Any) -> dict[str, Any]:
        """The answer to one more operation."""
        self.seq += 1
        body = json.dumps({"model_id": self.run, "seq_id": self.seq} | asked).encode()
        if kind == "forward_backward":
            body = np.full(SIZE, self.seq, np.float32).tobytes()
        await self.acceptor.accept(self.run, self.seq, kind, pack(body))
        self.collector.touch(self.session)
        await self.work()
        return self.answers[self.seq]

    async def work(self) -> None:
        async def publish(_n: int, commit: Commit) -> None:
            self.answers |= {result.seq: json.loads(result.body) for result in commit.results}

        while await self.held.apply_pending(lambda: False, publish):
            await self.snapshot()

    async def snapshot(self) -> None:
        """As a holder does it."""
        await self.held.snapshot()
        await journal.snapshots(self.store, self.run, self.held.manifest)

    async def step(self, *, sampler: bool = True) -> SamplerId | None:
        """Of an RL loop: it trains, and saves for its sampler."""
        await self.apply("forward_backward")
        await self.apply("optim_step", adam_params={})
        if not sampler:
            return None
        return await self.save_sampler()

    async def save_sampler(self, kind: str = "snapshot") -> SamplerId:
        answer = await self.apply("save_weights_for_sampler", sampling_session_seq_id=self.samplers, kind=kind)
        self.samplers += 1
        return SamplerId(answer["sampling_session_id"])

    async def finish(self) -> None:
        await Sessions(self.store).finish(self.session, Finish(reason="success", detail="", finished_at=self.clock.at))
        self.collector.touch(self.session)

    async def collect(self, after_s: float = 0.0) -> int:
        """The collector's work after so many seconds, as a chore does it: how many objects went."""
        self.clock.at += after_s
        self.collector.touch(self.session)
        return sum((await self.collector.work()).values())

    async def let_pass(self, after_s: float) -> None:
        """Let so much time go by, with a collector at work in it."""
        until = self.clock.at + after_s
        while self.clock.at < until:
            pause_s = min(max(self.collector.idle_s, self.collector.pace_s), until - self.clock.at)
            self.clock.at += pause_s
            await self.collector.work()

    async def get_sampler(self, sampler: SamplerId) -> str:
        """Its bundle. Raises NotFound."""
        return (await Samplers(self.store).get(sampler, self.tenant)).bundle

    async def names(self, prefix: str = "") -> list[str]:
        return await self.store.list(prefix)

    async def bundles(self, prefix: str = "adapters/") -> set[str]:
        return {name.rpartition("/")[0] + "/" for name in await self.store.list(prefix)}
