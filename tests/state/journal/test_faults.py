"""What the journal does when its store is not what it should be: recovers if it can, refuses if not, never guesses.

Replay one history:  python -m tests.state.journal.test_faults FAULT SEED
"""

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path

import msgspec
import pytest

from knapper.errors import Corrupt, StoreError
from knapper.ids import TinkerPath, number
from knapper.state import layout
from knapper.state.checkpoints import Checkpoint, Checkpoints
from knapper.state.journal import bundles
from knapper.state.journal.accept import Acceptor, newest_manifest
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, Manifest, Result, encode
from knapper.state.journal.results import Results
from knapper.state.journal.run import Run
from knapper.store import Names, Store
from knapper.store.directory import DirectoryStore
from knapper.store.memory import MemoryStore
from tests.sim.history import CREATION, RUN, TERMS, History, Step, digest_of, make_plan, send, undisturbed
from tests.sim.ledger import LedgerMachine
from tests.sim.world import pause
from tests.store.emulator import NewBucket
from tests.store.faulty import FaultyStore, Rates, SteppingClock

FAULTS = [field.name for field in fields(Rates)]
Damage = Callable[[str], Awaitable[None]]


async def nothing(_n: int, _commit: Commit) -> None:
    return None


# -- real corruption, in real stores -----------------------------------------------------------------------------------


@pytest.fixture(params=["directory", "gcs"])
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, Damage]:
    """A store, and what flips one bit of an object in it."""
    if request.param == "directory":

        async def flip_in_file(name: str) -> None:
            path = tmp_path / "store" / name
            path.write_bytes(flipped(path.read_bytes()))

        return DirectoryStore(tmp_path / "store"), flip_in_file
    new_bucket: NewBucket = request.getfixturevalue("new_bucket")
    store = new_bucket()

    async def flip_in_bucket(name: str) -> None:
        data = await store.get(name)
        assert data is not None
        store._blob(name).upload_from_string(flipped(data))

    return store, flip_in_bucket


def flipped(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


async def trained(store: Store, snapshots: int) -> tuple[str, Manifest]:
    """The digest of a run with so many snapshots, the newest manifest."""
    acceptor = Acceptor(store, lambda: 0.0)
    await acceptor.create(CREATION, b"create")
    run = await Run.claim(store, RUN, LedgerMachine(), Holder("h", "", TERMS), lambda: 0.0)
    for seq in range(1, 9):
        await send(acceptor, Step(seq, "optim_step", b"{}"))
        while await run.apply_pending(lambda: False, nothing):
            pass
        if seq in {1: (5,), 2: (3, 6)}[snapshots]:
            await run.snapshot()
    newest = await newest_manifest(store, RUN)
    assert newest is not None
    return await digest_of(LedgerMachine(), run), newest[1]


@pytest.mark.parametrize("snapshots", [1, 2])
def test_a_damaged_snapshot_is_refused_and_the_state_made_from_what_came_before(
    damaged: tuple[Store, Damage], snapshots: int
) -> None:
    store, damage = damaged

    async def story() -> None:
        digest, manifest = await trained(store, snapshots)
        await damage(f"{manifest.snapshot}state")
        with pytest.raises(Corrupt, match="bytes that are others"):
            await bundles.read(store, manifest.snapshot)
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("h2", "", TERMS), lambda: 0.0)
        assert await digest_of(LedgerMachine(), run) == digest

    asyncio.run(story())


def test_two_damaged_snapshots_end_the_claim_and_name_the_object(damaged: tuple[Store, Damage]) -> None:
    store, damage = damaged

    async def story() -> None:
        _, manifest = await trained(store, 2)
        await damage(f"{manifest.snapshot}state")
        await damage(f"{manifest.snapshot_before}state")
        with pytest.raises(Corrupt, match=f"{manifest.snapshot_before}state"):
            await Run.claim(store, RUN, LedgerMachine(), Holder("h2", "", TERMS), lambda: 0.0)

    asyncio.run(story())


def test_a_damaged_checkpoint_is_never_loaded_and_what_waits_goes_on_once_it_is_restored(
    damaged: tuple[Store, Damage],
) -> None:
    store, damage = damaged

    async def story() -> None:
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("h", "", TERMS), lambda: 0.0)
        path = f"tinker://{RUN}/weights/a"
        for seq, kind, asked in ((1, "save_weights", {"path": "a"}), (2, "load_weights", {"path": path})):
            body = {"model_id": RUN, "seq_id": seq, **asked, **({"optimizer": True} if seq == 2 else {})}
            await send(acceptor, Step(seq, kind, msgspec.json.encode(body)))  # type: ignore[arg-type]
            if seq == 1:
                while await run.apply_pending(lambda: False, nothing):
                    pass
        [part] = [name for name in await store.list("adapters/") if name.endswith("optimizer.safetensors")]
        await damage(part)
        for _ in range(2):
            with pytest.raises(Corrupt, match=r"optimizer.safetensors is .* bytes that are others"):
                await run.apply_pending(lambda: False, nothing)
        assert run.applied == 1
        await damage(part)  # the same bit again: it is as it was
        await run.apply_pending(lambda: False, nothing)
        assert run.applied == 2

    asyncio.run(story())


# -- listings that lag -------------------------------------------------------------------------------------------------


class Lagging(MemoryStore):
    """Its listings leave out what `hidden` names."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: set[str] = set()

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        shown = [name for name in await super().list(prefix, start_after) if name not in self.hidden]
        return shown[:limit] if limit else shown


def answer(seq: int) -> Commit:
    result = Result(seq=seq, sha256=b"", content_type="application/json", body=b"%d" % seq)
    return Commit(epoch=1, results=[result])


def test_an_answer_that_a_listing_left_out_is_not_taken_for_a_swept_one() -> None:
    async def story() -> None:
        store = Lagging()
        results = Results(store)
        await store.put_if_absent(layout.commit(RUN, 1), encode(answer(1)))
        assert await results.find(RUN, 1) is not None
        store.hidden.add(layout.commit(RUN, 2))
        for n in (2, 3):
            await store.put_if_absent(layout.commit(RUN, n), encode(answer(n)))
        assert (await results.find(RUN, 3) or answer(0).results[0]).body == b"3"
        assert (await results.find(RUN, 2) or answer(0).results[0]).body == b"2"

    asyncio.run(story())


def test_a_load_takes_the_newest_version_of_a_name_though_the_listing_lags() -> None:
    async def story() -> None:
        store = Lagging()
        checkpoints = Checkpoints(store, lambda: 0.0)
        path = TinkerPath(RUN, "weights", "a")
        for seq in (1, 2, 3):
            saved = Checkpoint(
                path=str(path), tenant="local", base_model="m", rank=1, bundle=f"bundle-{seq}", seq=seq, size_bytes=1,
                saved_at=0.0,
            )  # fmt: skip
            await checkpoints.save(saved, overwrite=True)
        store.hidden = {f"checkpoints/local/{RUN}/weights/a/{number(n)}" for n in (2, 3)}
        assert (await checkpoints.resolve(path, "local")).bundle == "bundle-3"

    asyncio.run(story())


def test_a_claim_whose_listing_lags_loses_nothing() -> None:
    async def story() -> None:
        store = Lagging()
        digest, _ = await trained(store, 1)
        commits = await store.list(layout.commits(RUN))
        store.hidden = {commits[-1], commits[-3]}
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("h2", "", TERMS), lambda: 0.0)
        assert run.applied == 8
        assert await digest_of(LedgerMachine(), run) == digest

    asyncio.run(story())


# -- a store that may not be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", ["the disk is full", "the bucket may only be read"])
def test_what_cannot_be_written_is_neither_answered_nor_lost(refusal: str) -> None:
    async def story() -> None:
        store = FaultyStore(MemoryStore(), random.Random(1), Rates())
        acceptor, results = Acceptor(store, lambda: 0.0), Results(store)
        await acceptor.create(CREATION, b"create")
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("h", "", TERMS), lambda: 0.0)
        await send(acceptor, Step(1, "optim_step", b"{}"))
        store.refusal = refusal
        for _ in range(2):
            with pytest.raises(StoreError, match=refusal):
                await run.apply_pending(lambda: False, nothing)
            with pytest.raises(StoreError, match=refusal):
                await send(acceptor, Step(2, "optim_step", b"{}"))
            assert await results.find(RUN, 1) is None, "nothing is shown that is not stored"
        store.refusal = ""
        await run.apply_pending(lambda: False, nothing)
        found = await results.find(RUN, 1)
        assert found is not None
        assert found.body == b'{"step":1}'

    asyncio.run(story())


# -- histories full of one fault ---------------------------------------------------------------------------------------


class FaultyHistory(History):
    """A history whose store and clock fail besides, until the world's own faults are used up."""

    def __init__(self, seed: int, rates: Rates) -> None:
        super().__init__(seed, make_plan(seed, length=12 + seed % 12), LedgerMachine(), claimants=1 + seed % 3)
        draw = random.Random(seed)
        self.faulty = FaultyStore(self.store, draw, rates, lambda _s: pause())
        self.clock = SteppingClock(self.world.clock, draw, rate=0.1)
        self.steady = False

    def carry_out(self) -> None:
        sound, self.store = self.store, self.faulty
        self.world.clock = self.clock  # type: ignore[method-assign]
        super().carry_out()
        self.store = sound


def play(fault: str, seed: int) -> FaultyHistory:
    """All faults a little and one of them much. Raises AssertionError unless all is as undisturbed."""
    rates = {name: 0.05 if name == fault else 0.003 for name in FAULTS}
    history = FaultyHistory(seed, Rates(**rates))
    truth = undisturbed(history.plan, LedgerMachine())
    history.carry_out()
    history.judge(truth)
    return history


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_the_store_or_the_clock_changes_a_result(fault: str) -> None:
    met = steps = 0
    for seed in range(25):
        history = play(fault, seed)
        met, steps = met + history.faulty.injected[fault], steps + history.clock.steps
    assert met > 20, "the fault hardly happened"
    assert steps > 20, "the clock hardly stepped"


if __name__ == "__main__":
    play(sys.argv[1], int(sys.argv[2]))
