"""The newest record is found beside writers and collectors, and a long life costs no more calls than a short one."""

import asyncio
import random
from pathlib import Path

import pytest

from knapper.errors import Unavailable
from knapper.ids import RunId, number
from knapper.state import layout
from knapper.state.journal import newest
from knapper.state.journal.accept import Acceptor, newest_manifest, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.newest import Manifests, newest_name, newest_of_few
from knapper.state.journal.records import Commit, Manifest, Result, encode
from knapper.state.journal.results import Results
from knapper.state.journal.run import Run
from knapper.store import Names, Store
from knapper.store.directory import DirectoryStore
from knapper.store.memory import MemoryStore
from tests.gateway.hours import CountingStore
from tests.sim.history import CREATION, RUN, TERMS
from tests.sim.ledger import LedgerMachine

PREFIX = "a/b/"


class Busy(MemoryStore):
    """While anybody lists, others write the next numbers, and delete some that are not the newest."""

    def __init__(self, draw: random.Random, first: int, last: int) -> None:
        super().__init__()
        self.draw, self.first, self.last, self.working = draw, first, last, False

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        if self.working:
            for _ in range(self.draw.randrange(4)):
                self.last += 1
                await self.put_if_absent(f"{PREFIX}{number(self.last)}", b"")
            for _ in range(self.draw.randrange(3)):  # a collector works from the front
                if self.first < self.last:
                    await self.delete(f"{PREFIX}{number(self.first)}")
                    self.first += 1
        return await super().list(prefix, start_after, limit)


@pytest.mark.parametrize("seed", range(200))
def test_the_newest_is_found_beside_those_who_write_and_those_who_delete(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(newest, "PAGE", draw.choice([2, 3, 7, 50]))

    async def story() -> None:
        first = draw.choice([1, 1, 1, draw.randrange(1, 10**6)])
        store = Busy(draw, first, first + draw.choice([0, 1, draw.randrange(20), draw.randrange(3000)]))
        for n in range(store.first, store.last + 1):
            await store.put_if_absent(f"{PREFIX}{number(n)}", b"")
        after = draw.choice([0, 0, draw.randrange(first, store.last + 1), max(first - 1, 1), store.last])
        at_first, store.working = store.last, draw.random() < 0.7
        name = await newest_name(store, PREFIX, after)
        store.working = False
        if not name:
            assert after >= at_first, "there was none above it"
        else:
            assert max(at_first, after + 1) <= int(name.removeprefix(PREFIX)) <= store.last

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(40))
def test_gaps_hide_nothing(seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that slept may write a number again that was deleted long ago."""
    draw = random.Random(seed)
    monkeypatch.setattr(newest, "PAGE", draw.choice([2, 3, 7]))

    async def story() -> None:
        store: Store = DirectoryStore(tmp_path) if seed < 5 else MemoryStore()
        numbers = sorted(draw.sample(range(1, 400), draw.randrange(1, 40)))
        for n in numbers:
            await store.put_if_absent(f"{PREFIX}{number(n)}", b"")
        assert await newest_name(store, PREFIX) == f"{PREFIX}{number(numbers[-1])}"
        after = draw.randrange(1, 400)
        above = [n for n in numbers if n > after]
        assert await newest_name(store, PREFIX, after) == (f"{PREFIX}{number(above[-1])}" if above else "")

    asyncio.run(story())


@pytest.mark.parametrize("page", [2, 3, 10])
def test_no_length_of_a_history_is_special(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newest, "PAGE", page)

    async def story() -> None:
        store = MemoryStore()
        for n in range(1, 300):
            await store.put_if_absent(f"{PREFIX}{number(n)}", b"")
            assert await newest_name(store, PREFIX) == f"{PREFIX}{number(n)}"

    asyncio.run(story())


def test_of_a_few_the_newest_is_read() -> None:
    async def story() -> None:
        store = MemoryStore()
        assert await newest_of_few(store, PREFIX) == (0, None)
        for n in (1, 2, 3):
            await store.put_if_absent(f"{PREFIX}{number(n)}", b"%d" % n)
        assert await newest_of_few(store, PREFIX) == (3, b"3")

    asyncio.run(story())


# ---- manifests


def manifest(epoch: int) -> bytes:
    return encode(Manifest(epoch=epoch, holder=f"h{epoch}", address="", claimed_at=0.0, terms=TERMS))


async def lay_manifests(store: Store, first: int, last: int, run: RunId = RUN) -> None:
    for n in range(first, last + 1):
        await store.put_if_absent(layout.manifest(run, n), manifest(n))


@pytest.mark.parametrize("count", [10, 998, 2000, 30_000])  # 998: whatever one listing can tell to be all
def test_the_newest_manifest_costs_a_process_that_has_seen_one_a_listing_however_many_there_are(count: int) -> None:
    async def story() -> None:
        store = CountingStore(MemoryStore())
        await lay_manifests(store, 1, count)
        manifests = Manifests(store)
        store.calls.clear()
        newest_seen = await manifests.newest(RUN)
        assert newest_seen is not None
        assert (newest_seen[0], newest_seen[1].epoch) == (count, count)
        cold = {10: 1, 998: 1, 2000: 2, 30_000: 10}
        assert store.calls == {("list", "runs/manifest"): cold[count], ("get", "runs/manifest"): 1}
        store.calls.clear()
        assert await manifests.newest(RUN) == newest_seen
        assert store.calls == {("list", "runs/manifest"): 1}
        await lay_manifests(store, count + 1, count + 1)
        store.calls.clear()
        assert await manifests.newest(RUN) == (count + 1, newest_seen[1].__class__(
            epoch=count + 1, holder=f"h{count + 1}", address="", claimed_at=0.0, terms=TERMS))  # fmt: skip
        assert store.calls == {("list", "runs/manifest"): 1, ("get", "runs/manifest"): 1}

    asyncio.run(story())


def test_the_newest_manifest_is_found_whatever_of_the_old_ones_is_gone() -> None:
    async def story() -> None:
        store, manifests = MemoryStore(), Manifests(MemoryStore())
        assert await newest_manifest(store, RUN) is None
        manifests = Manifests(store)
        await lay_manifests(store, 1, 5)
        assert (await manifests.newest(RUN) or (0,))[0] == 5
        await lay_manifests(store, 6, 40)
        for n in range(1, 40):  # while this process slept
            await store.delete(layout.manifest(RUN, n))
        assert (await manifests.newest(RUN) or (0,))[0] == 40
        assert (await newest_manifest(store, RUN) or (0,))[0] == 40

    asyncio.run(story())


def test_what_a_process_remembers_of_a_store_that_was_set_back_is_forgotten() -> None:
    async def story() -> None:
        store = MemoryStore()
        await lay_manifests(store, 1, 5)
        manifests = Manifests(store)
        assert (await manifests.newest(RUN) or (0,))[0] == 5
        for n in (3, 4, 5):  # an older backup
            await store.delete(layout.manifest(RUN, n))
        assert (await manifests.newest(RUN) or (0,))[0] == 2

    asyncio.run(story())


def test_a_manifest_that_is_superseded_and_deleted_while_it_is_read_is_looked_for_again() -> None:
    class Racing(MemoryStore):
        races, last = 0, 1

        async def get(self, name: str) -> bytes | None:
            if name.startswith(layout.manifests(RUN)) and self.races:
                self.races -= 1
                self.last += 1
                await self.put_if_absent(layout.manifest(RUN, self.last), manifest(self.last))
                await self.delete(name)
            return await super().get(name)

    async def story() -> None:
        store = Racing()
        await lay_manifests(store, 1, 1)
        store.races = 3
        assert (await Manifests(store).newest(RUN) or (0,))[0] == 4
        store.races = 10**9
        with pytest.raises(Unavailable, match="superseded"):
            await Manifests(store).newest(RUN)
        assert store.last == 4 + 4, "it gives up after four, and says so"

    asyncio.run(story())


# ---- answers


async def live(store: Store, operations: int) -> None:
    """A run that was held by one process for so long, and stored its snapshots."""
    acceptor = Acceptor(store, lambda: 0.0)
    await acceptor.create(CREATION, b"create")
    run = await Run.claim(store, RUN, LedgerMachine(), Holder("h", "", TERMS), lambda: 0.0)

    async def publish(_n: int, _commit: Commit) -> None:
        pass

    for seq in range(1, operations + 1):
        await acceptor.accept(RUN, seq, "optim_step", pack(b"{}"))
        while await run.apply_pending(lambda: False, publish):
            await run.snapshot()
    await run.snapshot()


@pytest.mark.parametrize("operations", [10, 2000])
def test_a_first_look_at_results_costs_as_much_after_a_long_life(operations: int) -> None:
    async def story() -> None:
        store = CountingStore(MemoryStore())
        await live(store.store, operations)
        result = await Results(store).find(RUN, operations)
        assert result is not None
        assert result.body == b'{"step":%d}' % operations
        assert store.calls == {
            ("list", "runs/out"): 2, ("list", "runs/manifest"): 1, ("get", "runs/manifest"): 1, ("get", "runs/out"): 1,
        }  # fmt: skip
        store.calls.clear()
        manifests = Manifests(store)
        await manifests.newest(RUN)  # as a gateway does that has rung the holder
        store.calls.clear()
        assert await Results(store, manifests).find(RUN, operations) == result
        assert store.calls == {("list", "runs/out"): 1, ("get", "runs/out"): 1}
        store.calls.clear()
        late = await Results(store, manifests).find(RUN, 3)
        assert late is not None
        assert late.body == b'{"step":3}'
        assert store.verbs["get"] <= 26, "it is searched for"
        assert store.verbs["list"] == 1

    asyncio.run(story())


def test_an_answer_that_is_gone_is_not_searched_for_among_all_that_are() -> None:
    async def story() -> None:
        store = CountingStore(MemoryStore())
        for n in range(1, 2001):
            result = Result(seq=n, sha256=b"", content_type="application/json", body=b"")
            if n > 1900:
                await store.put_if_absent(layout.commit(RUN, n), encode(Commit(epoch=1, results=[result])))
        results = Results(store)
        assert (await results.find(RUN, 2000)) is not None
        store.calls.clear()
        gone = await results.find(RUN, 7)
        assert gone is not None
        assert b"is gone" in gone.body
        assert store.verbs["get"] <= 26

    asyncio.run(story())


def test_whoever_waits_for_a_run_that_nobody_claimed_lists_once_a_look() -> None:
    async def story() -> None:
        store = CountingStore(MemoryStore())
        await Acceptor(store.store, lambda: 0.0).create(CREATION, b"create")
        results = Results(store)
        for _ in range(5):
            assert await results.find(RUN, 0) is None
        assert store.calls == {("list", "runs/out"): 5}
        await live(store.store, 3)
        assert (await results.find(RUN, 3)) is not None

    asyncio.run(story())


@pytest.mark.parametrize("seed", range(60))
def test_every_answer_that_is_there_is_found_in_any_order(seed: int) -> None:
    """Fences anywhere, commits of several results, and a beginning that was swept, but for its fences."""
    draw = random.Random(seed)

    async def story() -> None:
        store, seq, where = MemoryStore(), 0, dict[int, int]()
        last = draw.choice([1, 3, 40, 300])
        swept = draw.choice([0, 0, draw.randrange(last + 1)])
        for n in range(1, last + 1):
            size = 0 if draw.random() < 0.2 else draw.randint(1, 4)
            results = [
                Result(seq=seq + i, sha256=b"", content_type="application/json", body=b"%d" % (seq + i))
                for i in range(size)
            ]
            where |= {result.seq: n for result in results}
            seq += size
            if n > swept or not results:
                await store.put_if_absent(layout.commit(RUN, n), encode(Commit(epoch=1, results=results)))
        if draw.random() < 0.5:
            epoch = Manifest(
                epoch=1, holder="h", address="", claimed_at=0.0, terms=TERMS, snapshot_out=draw.randint(0, last)
            )
            await store.put_if_absent(layout.manifest(RUN, 1), encode(epoch))
        results_seen = Results(store)
        wanted = list(range(seq + 2))
        draw.shuffle(wanted)
        for each in wanted:
            result = await results_seen.find(RUN, each)
            if each >= seq or not any(n > swept for n in where.values()):
                assert result is None, (each, result)
            elif where[each] > swept:
                assert result is not None
                assert result.body == b"%d" % each
            else:
                assert result is not None
                assert b"is gone" in result.body

    asyncio.run(story())


def test_a_gateway_that_was_told_nothing_for_long_begins_anew_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knapper.state.journal.results._BEHIND_MAX", 20)

    async def story() -> None:
        store = CountingStore(MemoryStore())

        async def answer(first: int, last: int) -> None:
            for n in range(first, last + 1):
                result = Result(seq=n, sha256=b"", content_type="application/json", body=b"%d" % n)
                await store.put_if_absent(layout.commit(RUN, n), encode(Commit(epoch=1, results=[result])))

        await answer(1, 5)
        results = Results(store)
        assert (await results.find(RUN, 5)) is not None
        await answer(6, 500)
        store.calls.clear()
        result = await results.find(RUN, 500)
        assert result is not None
        assert result.body == b"500"
        assert store.calls == {("list", "runs/out"): 1, ("get", "runs/out"): 1}
        for seq in (7, 250, 499, 3):
            result = await results.find(RUN, seq)
            assert result is not None
            assert result.body == b"%d" % seq

    asyncio.run(story())
