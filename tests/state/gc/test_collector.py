"""What is collected and when, without a sweep: samplers, files, snapshots, results, runs, sessions."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from knapper.errors import Fenced, NotFound, StoreError
from knapper.ids import LOCAL_TENANT, TinkerPath, make_run_id
from knapper.jobs import control, needs
from knapper.jobs.names import Start
from knapper.observability import metrics
from knapper.state import layout
from knapper.state.gc.collector import Collector
from knapper.state.job_records import Spent, Trained, encode
from knapper.state.journal import bundles, ends
from knapper.state.journal.accept import newest_manifest, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, Creation, decode
from knapper.state.journal.results import GONE, Results
from knapper.state.journal.run import Run
from knapper.state.layout import ObjectKind
from knapper.state.ledger import Accounts
from knapper.state.sessions import Sampler, Samplers
from knapper.state.usage import Window
from knapper.store.counted import CountedStore
from knapper.store.memory import MemoryStore
from tests.sim.history import TERMS, digest_of
from tests.sim.ledger import LedgerMachine
from tests.state.gc.bench import DAY_S, KEEP, Bench

# -- a loop ------------------------------------------------------------------------------------------------------------


def test_a_loop_of_hundreds_of_steps_leaves_as_much_as_one_of_a_hundred() -> None:
    """Objects and bytes, but for a manifest a snapshot: what nothing needs any more goes while the loop goes on."""

    async def story() -> None:
        bench = Bench()
        await bench.begin()
        sizes: list[tuple[int, int]] = []
        for step in range(1, 301):
            await bench.step()
            if bench.held.wants_snapshot:
                await bench.snapshot()
            await bench.collect(after_s=20.0)
            if step % 100 == 0:
                kept = [name for name in await bench.names() if not name.startswith(layout.manifests(bench.run))]
                sizes.append((len(kept), sum([len(await bench.store.get(name) or b"") for name in kept])))
        (hundred, its_bytes), *later = sizes
        for objects, size in later:
            assert abs(objects - hundred) < 12, sizes
            assert size < its_bytes * 1.2, sizes
        manifests = await bench.names(layout.manifests(bench.run))
        assert len(manifests) <= 1 + 300 * 10 / 25, "one a snapshot, and one a snapshot's worth of compute"
        assert sum([len(await bench.store.get(name) or b"") for name in manifests]) < 600 * len(manifests)
        before = await digest_of(LedgerMachine(), bench.held)
        await bench.claim("second")
        assert await digest_of(LedgerMachine(), bench.held) == before

    asyncio.run(story())


# -- samplers ----------------------------------------------------------------------------------------------------------


def test_a_superseded_sampler_goes_once_nobody_asks_and_says_so_by_name() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        first = await bench.step()
        assert first is not None
        files = await bench.get_sampler(first)
        await bench.collect(after_s=6 * DAY_S)
        assert await bench.get_sampler(first) == files, "the newest stays, however long nobody asks"
        second = await bench.step()
        assert second is not None
        await bench.collect()
        for _ in range(5):
            bench.collector.touch_sampler(first)
            await bench.collect(after_s=KEEP.samplers_s - 1)
            assert await bench.get_sampler(first) == files
        await bench.collect(after_s=1)
        with pytest.raises(NotFound, match=f"sampler {first} is gone: newer weights .* keep weights under a name"):
            await bench.get_sampler(first)
        assert await bench.bundles() == {await bench.get_sampler(second)}

    asyncio.run(story())


@pytest.mark.parametrize("over", [False, True], ids=["superseded", "of a finished session"])
def test_a_sampler_that_another_gateway_serves_stays(over: bool) -> None:
    """Its client keeps to that gateway; this one's collector never sees it used."""

    async def story() -> None:
        bench = Bench()
        await bench.begin()
        used, unused = await bench.step(), await bench.step()
        assert used is not None
        assert unused is not None
        await bench.step()
        await (bench.finish() if over else bench.collect())
        other = bench.collector_of("second")
        for _ in range(5):
            other.touch_sampler(used)
            await other.show_uses()
            assert len(await bench.names("sampled/")) == 1
            await bench.collect(after_s=KEEP.samplers_s - 1)
            assert await bench.get_sampler(used)
        with pytest.raises(NotFound, match="is gone"):
            await bench.get_sampler(unused)
        await bench.collect(after_s=2)
        with pytest.raises(NotFound, match="is gone"):
            await bench.get_sampler(used)
        assert await bench.names("sampled/") == [], "the other one died; its record goes once it is too old"

    asyncio.run(story())


def test_a_gateway_shows_what_it_serves_once_a_while_and_takes_it_back() -> None:
    async def story() -> None:
        bench = Bench(CountedStore(MemoryStore()))
        await bench.begin()
        sampler = await bench.step()
        assert sampler is not None
        names = list[str]()
        for _ in range(int(KEEP.samplers_s)):
            bench.collector.touch_sampler(sampler)
            await bench.collector.show_uses()
            names += await bench.names("sampled/")
            bench.clock.at += 1
        assert len(set(names)) == 15, "a record for each fifteenth of the retention"
        assert len(names) == KEEP.samplers_s, "never none, nor two"
        bench.clock.at += KEEP.samplers_s
        await bench.collector.show_uses()
        assert await bench.names("sampled/") == []

    asyncio.run(story())


def test_a_damaged_record_of_uses_stands_for_every_sampler_of_its_session() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        first = await bench.step()
        assert first is not None
        await bench.step()
        await bench.collect()
        bench.clock.at += KEEP.samplers_s / 2
        name = ObjectKind.SAMPLERS_IN_USE.key(bench.session, int(bench.clock.at * 1e6), "second")
        await bench.store.put_if_absent(name, b"what is this")
        await bench.collect(after_s=KEEP.samplers_s - 1)
        assert await bench.get_sampler(first)
        await bench.collect(after_s=2)
        with pytest.raises(NotFound, match="is gone"):
            await bench.get_sampler(first)
        assert await bench.names("sampled/") == []

    asyncio.run(story())


def test_a_sampler_of_a_finished_session_says_that_and_a_stranger_hears_nothing() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        sampler = await bench.step()
        assert sampler is not None
        await bench.finish()
        await bench.collect()
        await bench.collect(after_s=KEEP.samplers_s)
        with pytest.raises(NotFound, match="its session has finished"):
            await bench.get_sampler(sampler)
        with pytest.raises(NotFound, match="does not exist; create one"):
            await Samplers(bench.store).get(sampler, "somebody")
        assert await bench.bundles() == set()

    asyncio.run(story())


def test_an_inflight_sampler_that_is_used_stays_and_moves_on_to_the_newest_weights() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        newest = used = await bench.save_sampler("inflight")
        for _ in range(20):
            await bench.step(sampler=False)
            newest = await bench.save_sampler("inflight")
            bench.collector.touch_sampler(used)
            await bench.collect(after_s=KEEP.samplers_s / 2)
        assert len(await bench.names("samplers/")) <= 5
        assert len(await bench.names("inflight/")) <= 5
        found = await Samplers(bench.store).inflight_after(bench.run, 1)
        assert found is not None
        assert found.sampler == newest
        await bundles.read(bench.store, found.bundle)
        assert await bench.get_sampler(used)

    asyncio.run(story())


def test_samplers_of_checkpoints_and_base_models_stay_while_their_session_lives() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        path = (await bench.apply("save_weights_for_sampler", path="a"))["path"]
        found = await bench.checkpoints.resolve(TinkerPath.parse(path), "local")
        for n, (bundle, model_path) in enumerate(((found.bundle, path), ("", ""))):
            sampler = Sampler(
                sampler=f"{bench.session}:sample:{n}", tenant="local", base_model="m", bundle=bundle,
                model_path=model_path,
            )  # fmt: skip
            await Samplers(bench.store).create(sampler)
        await bench.checkpoints.delete(TinkerPath.parse(path), "local")
        await bench.let_pass(6 * DAY_S)
        assert len(await bench.names("samplers/")) == 2
        assert await bench.bundles() == {found.bundle}, "a sampler holds it"
        await bench.finish()
        await bench.let_pass(KEEP.samplers_s + KEEP.orphans_s + 100)
        assert await bench.names("samplers/") == []
        assert await bench.bundles() == set()

    asyncio.run(story())


# -- checkpoints, and files --------------------------------------------------------------------------------------------


def test_a_time_to_live_ends_by_itself() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        await bench.apply("save_weights", path="for-good")
        await bench.apply("save_weights", path="for-an-hour", ttl_seconds=3600)
        kept = await bench.checkpoints.resolve(TinkerPath(bench.run, "weights", "for-good"), "local")
        await bench.let_pass(3500)
        assert len(await bench.bundles()) == 2
        await bench.let_pass(100 + KEEP.orphans_s + 2 * bench.collector.pace_s)
        assert await bench.bundles() == {kept.bundle}
        await bench.let_pass(300 * DAY_S)
        assert await bench.bundles() == {kept.bundle}

    asyncio.run(story())


def test_a_name_that_is_overwritten_again_and_again_leaves_one_version_and_its_files() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        for _ in range(20):
            await bench.apply("save_weights", path="latest", overwrite=True)
            await bench.collect(after_s=KEEP.orphans_s / 2)
        await bench.let_pass(2 * KEEP.orphans_s)
        found = await bench.checkpoints.resolve(TinkerPath(bench.run, "weights", "latest"), "local")
        assert (found.seq, await bench.bundles()) == (20, {found.bundle})
        assert len(await bench.names("checkpoints/")) == len(await bench.names("labels/")) == 2, "the first, the newest"
        late = msgspec.structs.replace(found, seq=3, bundle=f"adapters/{bench.run}/late/")
        await bench.checkpoints.save(late, overwrite=True)  # by a process that slept over its save
        found = await bench.checkpoints.resolve(TinkerPath(bench.run, "weights", "latest"), "local")
        assert found.bundle != late.bundle, "an old save took the name back"

    asyncio.run(story())


class Interrupted(MemoryStore):
    """Does something else just before the first object whose name begins so is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[str, Callable[[], Awaitable[Any]]] = {}

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        for prefix in [prefix for prefix in self.before if name.startswith(prefix)]:
            await self.before.pop(prefix)()
        return await super().put_if_absent(name, data)


def test_a_save_under_way_keeps_its_files_however_long_it_takes() -> None:
    """They lie there before their name does: what tells them from leftovers is that nothing is answered yet."""

    async def story() -> None:
        store = Interrupted()
        bench = Bench(store)
        await bench.begin()
        store.before["checkpoints/"] = store.before["samplers/"] = lambda: bench.let_pass(2 * DAY_S)
        path = (await bench.apply("save_weights", path="slow"))["path"]
        found = await bench.checkpoints.resolve(TinkerPath.parse(path), "local")
        await bundles.read(store, found.bundle)
        await bundles.read(store, await bench.get_sampler(await bench.save_sampler()))
        assert not store.before, "both saves were interrupted"

    asyncio.run(story())


def test_files_that_were_never_named_go_once_their_operation_is_answered() -> None:
    """A process died between a save's files and its name; another did the save again."""

    async def story() -> None:
        bench = Bench()
        await bench.begin()
        torn = f"adapters/{bench.run}/{1:020d}-{9:020d}/"
        await bench.store.put_if_absent(f"{torn}weights", b"whole or not")
        await bench.let_pass(5 * DAY_S)
        assert await bench.bundles() == {torn}
        sampler = await bench.save_sampler()
        await bench.let_pass(KEEP.orphans_s + 2 * bench.collector.pace_s)
        assert await bench.bundles() == {await bench.get_sampler(sampler)}

    asyncio.run(story())


def test_files_that_a_copy_leads_to_stay_for_it_and_go_after_it() -> None:
    async def story() -> None:
        bench, other = Bench(), Bench(number=1)
        other.store = bench.store
        other.__post_init__()
        other.clock.at = bench.clock.at
        await bench.begin()
        path = TinkerPath.parse((await bench.apply("save_weights", path="a"))["path"])
        source = await bench.checkpoints.resolve(path, "local")
        await other.begin()
        copy = TinkerPath(other.run, "weights", "a")
        copied = msgspec.structs.replace(source, path=str(copy), seq=0)
        await other.checkpoints.save(copied, overwrite=False)
        await bench.collector.delete(bench.run, "local")
        await bench.let_pass(3 * DAY_S)
        assert await bench.bundles() == {source.bundle}
        assert (await other.checkpoints.resolve(copy, "local")).bundle == source.bundle
        await other.checkpoints.delete(copy, "local")
        await bench.let_pass(KEEP.orphans_s + 3700)
        assert await bench.bundles() == set()

    asyncio.run(story())


# -- the journal -------------------------------------------------------------------------------------------------------


async def snapshots_of(bench: Bench) -> set[str]:
    return await bench.bundles(layout.snapshots(bench.run))


def test_the_holder_keeps_the_two_newest_snapshots() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        kept = set[str]()
        for _ in range(5):
            await bench.step()
            await bench.snapshot()
            newest = await newest_manifest(bench.store, bench.run)
            assert newest is not None
            kept = {each for each in (newest[1].snapshot, newest[1].snapshot_before) if each}
            assert await snapshots_of(bench) == kept
        assert len(kept) == 2

    asyncio.run(story())


def test_what_a_holder_could_not_delete_goes_without_one() -> None:
    """It died between the manifest and the deletion, and the run rests."""

    async def story() -> None:
        bench = Bench()
        await bench.begin()
        for _ in range(4):
            await bench.step()
            await bench.held.snapshot()
        assert len(await snapshots_of(bench)) == 4
        await bench.collect()
        assert len(await snapshots_of(bench)) == 2

    asyncio.run(story())


def test_a_snapshot_that_its_holder_died_over_goes_and_a_holder_that_only_slept_stores_no_broken_one() -> None:
    async def story() -> None:
        store = Interrupted()
        bench = Bench(store)
        await bench.begin()
        for _ in range(3):
            await bench.step()
            await bench.snapshot()
        await bench.step()
        before = await digest_of(LedgerMachine(), bench.held)
        asleep = layout.snapshot(bench.run, bench.seq, 1)

        async def sleep() -> None:
            assert await store.get(f"{asleep}state") is not None
            assert asleep in await snapshots_of(bench)
            await bench.let_pass(KEEP.orphans_s - 10)
            assert asleep in await snapshots_of(bench)
            await bench.let_pass(3 * KEEP.orphans_s)
            assert asleep not in await snapshots_of(bench)

        store.before[f"{asleep}index"] = sleep
        with pytest.raises(Fenced):
            await bench.held.snapshot()
        assert not store.before
        await bench.claim("second")
        assert await digest_of(LedgerMachine(), bench.held) == before
        await bench.let_pass(DAY_S)
        assert len(await snapshots_of(bench)) == 2

    asyncio.run(story())


def test_an_answer_stays_for_its_time_after_the_commit_and_then_says_that_it_is_gone() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        for _ in range(3):
            await bench.step(sampler=False)
            await bench.snapshot()
        await bench.collect(after_s=KEEP.results_s - 1)
        found = await Results(bench.store).find(bench.run, 1)
        assert found is not None
        assert not found.failed
        await bench.collect(after_s=1)
        found = await Results(bench.store).find(bench.run, 1)
        assert found is not None
        assert found.body == GONE
        assert [layout.last_number(name) for name in await bench.names(layout.operations(bench.run))] == [0, 5, 6]
        for seq in (5, 6):
            found = await Results(bench.store).find(bench.run, seq)
            assert found is not None
            assert not found.failed, "a recovery may need it"

    asyncio.run(story())


def test_what_a_run_used_is_told_the_same_after_its_records_have_gone() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        accounts = Accounts(bench.store, bench.clock, bench.clock, lambda: "x")
        await accounts.mark(LOCAL_TENANT, bench.run)
        for _ in range(4):
            await bench.step()
            await bench.snapshot()
        hour = int(bench.clock.at // 3600)
        window = Window(hour - 1, hour + 2)
        used = await accounts.used(LOCAL_TENANT, window)
        assert sum(device_s for _, device_s in used.values()) == 40.0
        bench.collector = Collector(bench.store, KEEP, bench.clock, bench.clock, account=accounts.account)
        assert await bench.collect(after_s=KEEP.results_s) > 8
        for reader in (accounts, Accounts(bench.store, bench.clock, bench.clock, lambda: "y")):
            assert await reader.used(LOCAL_TENANT, window) == used

    asyncio.run(story())


# -- jobs --------------------------------------------------------------------------------------------------------------


def test_a_job_finds_the_answers_of_its_step_however_long_it_stood_still() -> None:
    async def story() -> None:
        bench = Bench()
        start = Start(LOCAL_TENANT, "j", "0" * 16)
        bench.session, bench.run = start.session, start.run
        await bench.begin(tags=[needs.TAG, "rl"])
        await bench.store.put_if_absent(ObjectKind.TENANT_JOB.key(LOCAL_TENANT, 1, start.job, start.id), b"")

        async def need(session: Any, run: Any) -> Any:
            return await needs.of(bench.store, session, run)

        bench.collector = Collector(bench.store, KEEP, bench.clock, bench.clock, need)

        async def steps(count: int) -> None:
            for _ in range(count):
                await bench.step(sampler=False)
                await bench.snapshot()

        async def lowest() -> int:
            return layout.last_number((await bench.names(layout.operations(bench.run)))[1])

        await steps(3)
        trained = Trained(next_seq=5, steps=9, metrics={}, tokens=0, bytes=0, spent=Spent(), began_at=0.0, ended_at=0.0)
        await bench.collect(after_s=DAY_S)
        assert await lowest() == 1, "no step is done yet"
        await bench.store.put_if_absent(start.trained(0), encode(trained))
        await steps(2)
        await bench.let_pass(20 * DAY_S)
        assert await lowest() == 5, "the second step begins there"
        assert await ends.ended(bench.store, bench.run) is None, "nothing ends under a job that runs"
        assert await control.change(bench.store, start, "completed", "", bench.clock.at)
        await bench.let_pass(DAY_S)
        end = await ends.ended(bench.store, bench.run)
        assert end is not None
        assert end.reason == "finished"

    asyncio.run(story())


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_run_ends_after_its_session_and_its_checkpoints_stay() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        for _ in range(3):
            await bench.step()
            await bench.snapshot()
        path = TinkerPath.parse((await bench.apply("save_weights", path="a"))["path"])
        holder = bench.held
        await bench.finish()
        await bench.let_pass(KEEP.finished_s - 10)
        assert len(await snapshots_of(bench)) == 2
        await bench.let_pass(10 + KEEP.orphans_s + 4 * bench.collector.pace_s)
        left = await bench.names(f"{layout.operations(bench.run)[:-3]}")
        kinds = sorted(name.split("/")[2] for name in left)
        assert kinds == ["end", "in", "out", "out"], "its end, its creation, the fence of its claim and the last one"
        with pytest.raises(NotFound, match=r"its session had ended, .* create_training_client_from_state"):
            await bench.claim("late")
        await bench.acceptor.accept(bench.run, bench.seq + 1, "optim_step", pack(b"{}"))
        with pytest.raises(Fenced):
            await holder.apply_pending(lambda: False, _nothing)
        found = await bench.checkpoints.resolve(path, "local")
        fresh = make_run_id(bench.session, 1)
        await bench.acceptor.create(Creation(spec=bench.spec(fresh), source=found.bundle), b"from it")
        again = await Run.claim(bench.store, fresh, LedgerMachine(), Holder("new", "", TERMS), bench.clock)
        assert not await again.apply_pending(lambda: False, _nothing) or again.applied == 0

    asyncio.run(story())


async def _nothing(_n: int, _commit: Commit) -> None:
    return None


@pytest.mark.parametrize("asleep", ["state", "index", "manifest", "nowhere"])
def test_a_holder_that_slept_through_the_deletion_of_its_run_brings_nothing_back(asleep: str) -> None:
    """Before its snapshot, or over any part of it; in another process than the deletion's."""

    async def story() -> None:
        store = Interrupted()
        bench = Bench(store)
        await bench.begin()
        for _ in range(3):
            await bench.step()
            await bench.snapshot()
        await bench.step()
        snapshot = layout.snapshot(bench.run, bench.seq, 1)
        where = layout.manifests(bench.run) if asleep == "manifest" else f"{snapshot}{asleep}"
        if asleep == "nowhere":
            await bench.collector.delete(bench.run, "local")
        else:
            store.before[where] = lambda: bench.collector.delete(bench.run, "local")
        with pytest.raises(Fenced):
            await bench.held.snapshot()
        assert not store.before
        assert await bench.names(layout.snapshots(bench.run)) == []
        assert await bench.names("adapters/") == []
        with pytest.raises(NotFound, match=r"was deleted on .*; create another"):
            await bench.claim("late")

    asyncio.run(story())


def test_a_deletion_that_was_cut_off_is_finished_by_the_chore() -> None:
    """At each of its deletions in turn."""

    class Broken(MemoryStore):
        left = -1

        async def delete(self, name: str) -> None:
            if self.left == 0:
                raise StoreError("the process died")
            self.left -= 1
            await super().delete(name)

    async def story() -> None:
        for at in range(200):
            store = Broken()
            bench = Bench(store)
            await bench.begin()
            for _ in range(3):
                await bench.step()
                await bench.snapshot()
            await bench.apply("save_weights", path="a")
            store.left = at
            try:
                await bench.collector.delete(bench.run, "local")
                break
            except StoreError:
                pass
            store.left = -1
            bench.collector = Collector(store, KEEP, bench.clock, bench.clock)  # of a gateway that starts
            await bench.collector.work()
            for prefix in ("adapters/", "checkpoints/", "samplers/", layout.operations(bench.run)[:-3] + "snap/"):
                assert await bench.names(prefix) == [], f"cut off at deletion {at}"
            assert await bench.names(layout.operations(bench.run)) == []
        assert at > 20, "it was cut off at hardly any point"

    asyncio.run(story())


def test_a_session_without_checkpoints_leaves_nothing_in_the_end() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        for _ in range(3):
            await bench.step()
            await bench.snapshot()
        await bench.apply("save_weights", path="a", ttl_seconds=3600)
        await bench.finish()
        await bench.let_pass(KEEP.records_s + DAY_S)
        assert await bench.names() == ["collect/begun"]

    asyncio.run(story())


def test_a_session_with_a_checkpoint_stays_unwatched_until_that_is_deleted() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        path = TinkerPath.parse((await bench.apply("save_weights", path="a"))["path"])
        await bench.finish()
        await bench.let_pass(KEEP.records_s + DAY_S)
        assert await bench.names("collect/") == ["collect/begun"]
        assert await bench.names("sessions/")
        await bench.checkpoints.resolve(path, "local")
        await bench.checkpoints.delete(path, "local")
        await bench.let_pass(DAY_S)
        assert await bench.names() == ["collect/begun"]

    asyncio.run(story())


def test_a_silent_session_is_over_after_a_week_and_its_run_ends_a_while_later() -> None:
    async def story() -> None:
        bench = Bench(keep=replace(KEEP, records_s=1e9))
        await bench.begin()
        await bench.step()
        await bench.snapshot()
        await bench.let_pass(7 * DAY_S)
        assert await ends.ended(bench.store, bench.run) is None
        await bench.let_pass(KEEP.finished_s + 2 * DAY_S)
        assert await ends.ended(bench.store, bench.run) is not None
        assert await bench.bundles() == set()

    asyncio.run(story())


# -- what it costs -----------------------------------------------------------------------------------------------------


def counted(bench: Bench) -> Callable[[], float]:
    """Calls of the store so far."""
    bench.store = CountedStore(bench.store)
    bench.__post_init__()

    def calls() -> float:
        found = metrics.store_calls.collect()
        return sum(sample.value for each in found for sample in each.samples if sample.name.endswith("_total"))

    return calls


def test_sessions_in_which_nothing_happens_cost_a_handful_of_calls_an_hour() -> None:
    async def story() -> None:
        bench = Bench()
        calls = counted(bench)
        await bench.begin()
        for _ in range(3):
            await bench.step()
            await bench.snapshot()
        await bench.let_pass(DAY_S)
        before = calls()
        await bench.let_pass(DAY_S)
        assert calls() - before < 24 * 5, "an open session: the marks once an hour, itself once a day"
        await bench.finish()
        await bench.let_pass(3 * DAY_S)
        before = calls()
        await bench.let_pass(DAY_S)
        assert calls() - before <= 25, "nothing is left but to look for marks"

    asyncio.run(story())


def test_what_is_finished_is_not_looked_through_again() -> None:
    async def story() -> None:
        bench = Bench()
        calls = counted(bench)
        for number in range(40):
            other = Bench(bench.store, bench.clock, number=number + 1)
            await other.begin()
            await other.apply("save_weights", path="kept")
            await other.finish()
        await bench.let_pass(KEEP.records_s + DAY_S)
        fresh = Bench(bench.store, bench.clock, number=0)
        fresh.clock.at += 3600
        before = calls()
        await fresh.collector.work()
        assert calls() - before <= 3

    asyncio.run(story())


def test_a_store_of_before_there_were_marks_is_marked_once() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        for _ in range(4):
            await bench.step()
            await bench.held.snapshot()
        for name in await bench.names("collect/"):
            await bench.store.delete(name)
        await bench.collector.work()
        assert len(await snapshots_of(bench)) == 2
        assert "collect/begun" in await bench.names("collect/")

    asyncio.run(story())


def test_a_damaged_record_keeps_nothing_else_from_being_collected() -> None:
    async def story() -> None:
        benches = [Bench()]
        benches += [Bench(benches[0].store, benches[0].clock, number=n) for n in (1, 2)]
        for bench in benches:
            await bench.begin()
            for _ in range(4):
                await bench.step()
                await bench.held.snapshot()
        damaged = benches[0]
        last = (await damaged.names(layout.manifests(damaged.run)))[-1]
        await damaged.store.delete(last)
        await damaged.store.put_if_absent(last, b"\xc1")
        await damaged.collector.work()
        assert [len(await snapshots_of(bench)) for bench in benches] == [4, 2, 2]

    asyncio.run(story())


def test_while_a_sampler_is_damaged_files_that_nobody_needs_are_kept_and_all_else_goes() -> None:
    """It may lead to any of them; and it is no other tenant's trouble when that one deletes a run."""

    async def story() -> None:
        benches = [Bench()]
        benches.append(Bench(benches[0].store, benches[0].clock, number=1))
        for bench in benches:
            await bench.begin()
            await bench.step()
            await bench.apply("save_weights", path="mine")
        store, other = benches[0].store, benches[1]
        name = (await store.list(f"samplers/{benches[0].session}"))[0]
        sound = await store.get(name) or b""
        await store.delete(name)
        await store.put_if_absent(name, sound[:-1])
        assert await other.collector.delete(other.run, other.tenant) > 0
        assert await ends.ended(store, other.run) is not None
        assert await store.list(f"adapters/{other.run}/")
        await store.delete(name)
        await store.put_if_absent(name, sound)
        await other.collector.delete(other.run, other.tenant)
        assert not await store.list(f"adapters/{other.run}/")

    asyncio.run(story())


@pytest.mark.parametrize("which", ["in", "out", "creation", "sampler"])
def test_a_damaged_run_can_be_deleted(which: str) -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        await bench.step()
        store = bench.store
        names_of = {
            "in": (await bench.names(layout.operations(bench.run)))[-1],
            "out": (await bench.names(layout.commits(bench.run)))[-1],
            "creation": layout.operation(bench.run, 0),
            "sampler": (await store.list("samplers/"))[0],
        }
        await store.delete(names_of[which])
        await store.put_if_absent(names_of[which], b"damaged")
        tenant, count = await bench.collector.delete_of_any_tenant(bench.run)
        assert (tenant, count > 0) == (bench.tenant, True)
        assert await store.list(layout.operations(bench.run)) == []
        assert await store.list(layout.snapshots(bench.run)) == []

    asyncio.run(story())


def test_fences_and_manifests_of_a_run_that_lives_stay() -> None:
    async def story() -> None:
        bench = Bench()
        await bench.begin()
        for n in range(4):
            await bench.claim(f"claim-{n}")
            await bench.step()
            await bench.snapshot()
        manifests = await bench.names(layout.manifests(bench.run))
        await bench.let_pass(6 * DAY_S)
        assert await bench.names(layout.manifests(bench.run)) == manifests
        kept = await bench.names(layout.commits(bench.run))
        fences = [name for name in kept if not decode(await bench.store.get(name) or b"", Commit, name).results]
        assert len(fences) == 5, "one a claim"
        assert len(kept) - len(fences) < 4

    asyncio.run(story())
