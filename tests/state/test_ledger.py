"""What runs have used is accounted for exactly: the sum of what their journals say, whoever dies, however often."""

import asyncio
import random
from collections import defaultdict
from dataclasses import dataclass, field

import pytest

from knapper import limits
from knapper.errors import InvalidField, StoreError
from knapper.ids import LOCAL_TENANT, RunId, Tenant, session_of
from knapper.state import layout, ledger_entries
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.records import Commit, Creation, Result, encode
from knapper.state.layout import run_prefix
from knapper.state.ledger import Accounts
from knapper.state.ledger_entries import LedgerEntry, Through
from knapper.state.sessions import Finish, Sessions
from knapper.state.usage import HOUR_S, Window
from knapper.store.memory import MemoryStore
from tests.gateway.finished import begin, run_of, spec_of
from tests.gateway.hours import CountingStore
from tests.gateway.running import fwdbwd
from tests.gateway.saved import Clock
from tests.store.faulty import FaultyStore, Rates

BEGAN_AT = 1000.0 * HOUR_S
ALL = Window(0, 10**6)
OTHER = Tenant("other")
Use = dict[tuple[int, RunId], tuple[int, float]]


@dataclass
class Truth:
    """What a run really used, kept by the one who lets it work."""

    run: RunId
    tenant: Tenant
    asked: dict[int, tuple[float, int]] = field(default_factory=dict)  # seq -> when, tokens
    answered: int = 0  # operations below it
    out: int = 0
    failed: set[int] = field(default_factory=set)
    device: list[tuple[float, float]] = field(default_factory=list)
    finished_at: float | None = None

    def used(self) -> Use:
        found: dict[tuple[int, RunId], list[float]] = defaultdict(lambda: [0, 0.0])
        for seq, (at, tokens) in self.asked.items():
            if seq not in self.failed:
                found[int(at // HOUR_S), self.run][0] += tokens
        for at, device_s in self.device:
            found[int(at // HOUR_S), self.run][1] += device_s
        return {key: (int(tokens), device_s) for key, (tokens, device_s) in found.items() if tokens or device_s}


class World:
    """Two gateways and an engine over one store that fails by the throw of a die."""

    def __init__(self, seed: int, rates: Rates) -> None:
        self.draw = random.Random(seed)
        self.clock = Clock(BEGAN_AT)
        self.memory = MemoryStore()
        self.faulty = FaultyStore(self.memory, random.Random(seed + 1), rates, self._pause)
        self.runs = [Truth(run_of(n), self.draw.choice([LOCAL_TENANT, OTHER])) for n in range(self.draw.randint(1, 4))]
        self.gateways = [self._gateway(), self._gateway()]
        self.flying: list[tuple[float, Truth, int, bytes, Accounts]] = []  # marked, and not stored yet

    async def _pause(self, _: float) -> None:
        pass

    def _gateway(self) -> Accounts:
        """A process with an empty memory."""
        return Accounts(self.faulty, self.clock, self.clock, lambda: f"{self.draw.getrandbits(64):x}")

    async def begin(self) -> None:
        for truth in self.runs:
            await begin(self.memory, self.clock, truth.run, truth.tenant)
            truth.asked[0] = (self.clock.at, 0)

    async def turn(self) -> None:
        self.clock.at += self.draw.choice([0.0, 1.0, 60.0, 600.0, 1700.0, 4000.0, 20_000.0])
        await self._land()
        todo = self.draw.choice([self._ask] * 6 + [self._answer] * 4 + [self._settle] * 3 + [self._die, self._finish])
        try:
            await todo()
        except StoreError:
            pass  # whoever asked gets an error, and may ask again or not

    async def _ask(self) -> None:
        truth = self.draw.choice(self.runs)
        gateway = self.draw.choice(self.gateways)
        if truth.finished_at is not None and self.clock.at - truth.finished_at > 200.0:
            return  # no client asks anything of a session that it finished, but for what was on its way
        await gateway.mark(truth.tenant, truth.run)
        tokens = self.draw.choice([0, 3, 50])
        seq = len(truth.asked) + sum(each[1] is truth for each in self.flying)
        body = fwdbwd(truth.run, seq, tokens) if tokens else b"{}"
        late_s = self.draw.choice([0.0, 0.0, 99.0, 1700.0 if truth.finished_at is None else 0.0])
        self.flying.append((self.clock.at + late_s, truth, tokens, body, gateway))
        await self._land()

    async def _land(self) -> None:
        """What was under way arrives at the store, in any order but for that of its own run."""
        for each in list(self.flying):
            due_at, truth, tokens, body, gateway = each
            if due_at <= self.clock.at:
                self.flying.remove(each)
                seq = len(truth.asked)
                kind = "forward_backward" if tokens else "optim_step"
                body = fwdbwd(truth.run, seq, tokens) if tokens else body
                stored_at = min(due_at, self.clock.at)
                acceptor = Acceptor(self.memory, lambda at=stored_at: at)  # type: ignore[misc]
                accepted_at = await acceptor.accept(truth.run, seq, kind, pack(body))  # type: ignore[arg-type]
                assert accepted_at == stored_at
                truth.asked[seq] = (stored_at, tokens)
                if self.draw.random() < 0.8:  # else it dies before it notes it
                    gateway.asked(truth.run, seq, accepted_at, tokens)

    async def _answer(self) -> None:
        truth = self.draw.choice(self.runs)
        size = min(self.draw.choice([0, 1, 1, 2, 5]), len(truth.asked) - truth.answered)
        results = [
            Result(
                seq=truth.answered + i, sha256=b"", content_type="application/json", body=b"",
                failed=self.draw.random() < 0.2,
            )
            for i in range(size)
        ]  # fmt: skip
        device_s = round(self.draw.random(), 3) if results else 0.0
        commit = Commit(epoch=1, results=results, committed_at=self.clock.at if results else 0.0, device_s=device_s)
        truth.out += 1
        assert await self.memory.put_if_absent(layout.commit(truth.run, truth.out), encode(commit))
        truth.answered += size
        truth.failed |= {result.seq for result in results if result.failed}
        if results:
            truth.device.append((self.clock.at, device_s))
        if self.draw.random() < 0.6:
            self.draw.choice(self.gateways).answered(truth.run, truth.out, commit)

    async def _settle(self) -> None:
        both = self.gateways if self.draw.random() < 0.3 else self.draw.sample(self.gateways, 1)
        await asyncio.gather(*(gateway.settle() for gateway in both))

    async def _finish(self) -> None:
        """One of the gateways hears of it."""
        truth = self.draw.choice(self.runs)
        truth.finished_at = truth.finished_at or self.clock.at
        session = session_of(truth.run)
        await Sessions(self.memory).finish(session, Finish(reason="success", detail="", finished_at=truth.finished_at))
        self.draw.choice(self.gateways).forget(session)

    async def _die(self) -> None:
        self.gateways[self.draw.randrange(2)] = self._gateway()

    async def rest(self) -> None:
        """All is answered, and quiet: then no mark is left, and no journal is asked."""
        self.clock.at += 1700.0
        await self._land()
        for truth in self.runs:
            if size := len(truth.asked) - truth.answered:
                truth.out += 1
                commit = Commit(epoch=1, results=[_done(truth.answered + i) for i in range(size)], device_s=1.0,
                                committed_at=self.clock.at)  # fmt: skip
                await self.memory.put_if_absent(layout.commit(truth.run, truth.out), encode(commit))
                truth.answered = len(truth.asked)
                truth.device.append((self.clock.at, 1.0))
        self.clock.at += 2 * HOUR_S
        assert not await Accounts(self.memory, self.clock, self.clock, lambda: "last").settle()
        assert await self.memory.list("using/") == []

    async def told(self, tenant: Tenant, window: Window) -> Use:
        """By a process that has seen nothing, over a store that does not fail."""
        fresh = Accounts(self.memory, self.clock, self.clock, lambda: "x")
        found = await fresh.used(tenant, window)
        return {key: value for key, value in found.items() if value[0] or value[1]}

    def true(self, tenant: Tenant, window: Window) -> Use:
        return {
            key: value
            for truth in self.runs
            if truth.tenant == tenant
            for key, value in truth.used().items()
            if window.first <= key[0] < window.end
        }


def alike(told: Use, true: Use) -> None:
    assert told.keys() == true.keys()
    for key, (tokens, device_s) in true.items():
        assert told[key][0] == tokens
        assert told[key][1] == pytest.approx(device_s, abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_accounts_are_the_sum_of_what_journals_say_at_every_moment(seed: int) -> None:
    rates = Rates(unavailable=0.03, timeout_before=0.02, timeout_after=0.03, torn=0.02) if seed % 2 else Rates()

    async def story() -> None:
        world = World(seed, rates)
        first = Accounts(world.memory, world.clock, world.clock, lambda: "first")
        assert await first.begun(), "nobody has made anything yet"
        await first.settle()
        await world.begin()
        for truth in world.runs:
            await first.mark(truth.tenant, truth.run)
        for turn in range(120):
            await world.turn()
            if turn % 6 == 0:
                first_hour = int(world.clock.at // HOUR_S) - world.draw.choice([0, 1, 5, 100])
                for window in (ALL, Window(first_hour, first_hour + world.draw.choice([1, 3, 24]))):
                    tenant = world.draw.choice([LOCAL_TENANT, OTHER])
                    alike(await world.told(tenant, window), world.true(tenant, window))
        await world.rest()
        for tenant in (LOCAL_TENANT, OTHER):
            alike(await world.told(tenant, ALL), world.true(tenant, ALL))

    asyncio.run(story())


@pytest.mark.parametrize("count", [10, 2000])
def test_usage_of_finished_runs_costs_two_listings_however_many_there_are(count: int) -> None:
    """A bucket tells a thousand names a request: of 2000 lines, which are the answer, it takes three."""

    async def story() -> None:
        clock, store = Clock(BEGAN_AT), CountingStore(MemoryStore())
        gateway = Accounts(store, clock, clock, lambda: "g")
        await gateway.settle()
        truths = [Truth(run_of(n), LOCAL_TENANT) for n in range(count)]
        for truth in truths:
            await gateway.mark(LOCAL_TENANT, truth.run)
            acceptor = Acceptor(store.store, clock)
            await acceptor.create(Creation(spec=spec_of(truth.run)), b"create")
            await acceptor.accept(truth.run, 1, "forward_backward", pack(fwdbwd(truth.run, 1, 7)))
            results = [Result(seq=seq, sha256=b"", content_type="application/json", body=b"") for seq in (0, 1)]
            commit = Commit(epoch=1, results=results, committed_at=clock.at, device_s=0.25)
            await store.put_if_absent(layout.commit(truth.run, 1), encode(commit))
        clock.at += 1.1 * HOUR_S
        assert not await gateway.settle()
        fresh = Accounts(store, clock, clock, lambda: "f")
        store.calls.clear()
        hour = int(BEGAN_AT // HOUR_S)
        found = await fresh.used(LOCAL_TENANT, Window(hour, hour + 24))
        assert found == {(hour, truth.run): (7, 0.25) for truth in truths}
        assert store.calls == {("list", "using"): 1, ("list", "used"): 1 if count < 1000 else 3}
        store.calls.clear()
        assert await fresh.used(LOCAL_TENANT, Window(hour + 1, hour + 24)) == {}
        assert await fresh.used(LOCAL_TENANT, Window(hour - 24, hour)) == {}
        assert store.calls == {("list", "using"): 2, ("list", "used"): 2}, "of other times nothing is looked at"
        store.calls.clear()
        assert not await fresh.settle()
        assert store.calls == {("list", "using"): 1, ("get", "accounts"): 1}

    asyncio.run(story())


def test_runs_from_before_there_were_accounts_are_told_of_too_and_then_accounted_for() -> None:
    async def story() -> None:
        clock, store = Clock(BEGAN_AT), CountingStore(MemoryStore())
        runs = [run_of(n) for n in range(5)]
        for run in runs:
            await begin(store, clock, run)
            await Acceptor(store, clock).accept(run, 1, "forward_backward", pack(fwdbwd(run, 1, 7)))
            results = [Result(seq=seq, sha256=b"", content_type="application/json", body=b"") for seq in (0, 1)]
            commit = Commit(epoch=1, results=results, committed_at=clock.at, device_s=0.25)
            await store.put_if_absent(layout.commit(run, 1), encode(commit))
        gateway = Accounts(store, clock, clock, lambda: "g")
        assert not await gateway.begun(), "the journals are asked until then"
        assert not await gateway.settle()
        assert await gateway.begun()
        hour = int(BEGAN_AT // HOUR_S)
        assert await gateway.used(LOCAL_TENANT, ALL) == {(hour, run): (7, 0.25) for run in runs}
        assert await store.list("using/") == []
        for run in runs:  # what the journals said is not needed any more
            for name in await store.list(layout.commits(run)) + await store.list(layout.operations(run)):
                await store.delete(name)
        assert await gateway.used(LOCAL_TENANT, ALL) == {(hour, run): (7, 0.25) for run in runs}

    asyncio.run(story())


def test_one_damaged_run_does_not_keep_the_others_from_their_accounts() -> None:
    async def story() -> None:
        clock, store = Clock(BEGAN_AT), MemoryStore()
        gateway = Accounts(store, clock, clock, lambda: "g")
        await gateway.settle()
        for n in range(3):
            await gateway.mark(LOCAL_TENANT, run_of(n))
            await begin(store, clock, run_of(n))
            commit = Commit(epoch=1, results=[_done(0)], committed_at=clock.at, device_s=0.5)
            await store.put_if_absent(layout.commit(run_of(n), 1), encode(commit) if n else b"damaged")
        clock.at += 2 * HOUR_S
        assert await gateway.settle(), "one is left"
        assert {name.split("/")[2] for name in await store.list("using/")} == {run_of(0)}
        assert {name.split("/")[3] for name in await store.list("used/")} == {run_of(1), run_of(2)}

    asyncio.run(story())


def _done(seq: int) -> Result:
    return Result(seq=seq, sha256=b"", content_type="application/json", body=b"")


def test_a_long_life_leaves_a_line_an_hour_and_one_mark() -> None:
    async def story() -> None:
        clock, store, run = Clock(BEGAN_AT), MemoryStore(), run_of(0)
        ids = iter(range(10**6))
        gateway = Accounts(store, clock, clock, lambda: f"{next(ids)}")
        await gateway.settle()
        await begin(store, clock, run)
        for n in range(1, 101):
            await gateway.mark(LOCAL_TENANT, run)
            commit = Commit(epoch=1, results=[_done(n - 1)], committed_at=clock.at, device_s=1.0)
            await store.put_if_absent(layout.commit(run, n), encode(commit))
            clock.at += 900.0
            assert await gateway.settle() or n == 100
        assert len(await store.list("using/")) <= 3
        assert len(await store.list("used/")) == 25
        assert len(await store.list(f"{run_prefix(run)}used/")) == 1
        assert sum(device_s for _, device_s in (await gateway.used(LOCAL_TENANT, ALL)).values()) == 100.0

    asyncio.run(story())


def test_too_much_that_is_not_accounted_for_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "operations_listed_max", 3)

    async def story() -> None:
        clock, store, run = Clock(BEGAN_AT), MemoryStore(), run_of(0)
        gateway = Accounts(store, clock, clock, lambda: "g")
        await gateway.mark(LOCAL_TENANT, run)
        await begin(store, clock, run)
        for seq in range(1, 5):
            if seq == 4:
                assert len(await gateway.used(LOCAL_TENANT, ALL)) == 1
            await Acceptor(store, clock).accept(run, seq, "optim_step", pack(b"{}"))
        with pytest.raises(InvalidField, match="Ask for fewer hours"):
            await gateway.used(LOCAL_TENANT, ALL)
        assert await gateway.used(LOCAL_TENANT, Window(0, 5)) == {}

    asyncio.run(story())


@pytest.mark.parametrize("device_s", [0.0, 1e-9, 0.1 + 0.2, 12345.678, 1e22])
def test_a_line_is_read_as_it_was_written(device_s: float) -> None:
    async def story() -> None:
        store = MemoryStore()
        line = LedgerEntry(5, run_of(1), Through(3, 4), 10**12, device_s)
        await ledger_entries.write(store, LOCAL_TENANT, line)
        assert await ledger_entries.within(store, LOCAL_TENANT, Window(5, 6)) == {(5, run_of(1)): line}
        assert await ledger_entries.of_run(store, LOCAL_TENANT, 5, run_of(1)) == line
        assert await ledger_entries.within(store, LOCAL_TENANT, Window(4, 5)) == {}
        assert await ledger_entries.within(store, LOCAL_TENANT, Window(6, 7)) == {}

    asyncio.run(story())
