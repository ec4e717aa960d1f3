"""Claimed runs: operations that the server cannot apply are retried, and a run of another dtype stays unchanged."""

import asyncio
import itertools
from dataclasses import replace

import msgspec
import pytest

from knapper import limits
from knapper.errors import OtherDtype, OutOfMemory, Unavailable
from knapper.events.cloudevents import Committed, Done, Frame
from knapper.ids import RunId
from knapper.serving.runs import ClaimedRuns
from knapper.state import layout
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.holder import Holder
from knapper.state.journal.machine import Files, Outcome
from knapper.state.journal.records import Commit, Manifest, Operation, decode
from knapper.store.memory import MemoryStore
from tests.sim.history import CREATION, RUN, TERMS, Step, send
from tests.sim.ledger import LedgerMachine, LedgerState


class Defective(LedgerMachine):
    async def apply(self, state: LedgerState, operation: Operation, source: Files | None) -> Outcome[LedgerState]:
        if operation.seq == 1:
            raise ZeroDivisionError("a defect")
        return await super().apply(state, operation, source)


def test_a_defect_is_answered_after_three_tries_and_the_run_goes_on() -> None:
    async def story() -> None:
        store = MemoryStore()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for seq in (1, 2):
            await send(acceptor, Step(seq, "optim_step", b"{}"))
        runs = ClaimedRuns(store, Defective(), Holder("h", "", TERMS), lambda: 0.0)

        async def ring() -> list[Frame]:
            return [frame async for frame in runs.answer(RUN)]

        for _ in range(2):
            with pytest.raises(Unavailable, match="a defect"):
                await ring()
        commits = [frame.commit for frame in await ring() if isinstance(frame, Committed)]
        results = {result.seq: result for commit in commits for result in commit.results}
        assert results[1].failed
        assert b"failed 3 times, by a defect of the server" in results[1].body
        assert not results[2].failed

    asyncio.run(story())


class Cramped(LedgerMachine):
    """Has no memory for operation 1, and none to restore a run as long as it is `full`."""

    full = False

    async def apply(self, state: LedgerState, operation: Operation, source: Files | None) -> Outcome[LedgerState]:
        if operation.seq == 1 or self.full:
            raise OutOfMemory("it does not fit: it needs 9.0 GiB at once; 1.0 GiB are free")
        return await super().apply(state, operation, source)


def test_what_does_not_fit_is_told_after_three_tries_by_its_name_and_the_run_goes_on() -> None:
    async def story() -> None:
        store, machine = MemoryStore(), Cramped()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for seq in (1, 2):
            await send(acceptor, Step(seq, "optim_step", b"{}"))
        runs = ClaimedRuns(store, machine, Holder("h", "", TERMS), lambda: 0.0)

        async def ring() -> list[Frame]:
            return [frame async for frame in runs.answer(RUN)]

        for _ in range(2):
            with pytest.raises(Unavailable, match=r"9\.0 GiB"):
                await ring()
        commits = [frame.commit for frame in await ring() if isinstance(frame, Committed)]
        results = {result.seq: result for commit in commits for result in commit.results}
        assert msgspec.json.decode(results[1].body) == {
            "error": "operation 1 failed 3 times: it does not fit: it needs 9.0 GiB at once; 1.0 GiB are free",
            "category": "user",
        }
        assert not results[2].failed

        machine.full = True
        runs = ClaimedRuns(store, machine, Holder("h2", "", TERMS), lambda: 0.0)
        with pytest.raises(Unavailable, match=rf"no memory for {RUN} now: it does not fit"):  # operation 2 is replayed
            await ring()
        machine.full = False
        assert [type(frame) for frame in await ring()][-1] is Done

    asyncio.run(story())


@pytest.mark.parametrize(("made", "other"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_run_of_another_dtype_is_refused_before_anything_is_done_and_goes_on_in_its_own(
    made: str, other: str
) -> None:
    """Whatever else changed: threads and versions move last bits, which the log says."""

    async def story() -> None:
        store = MemoryStore()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")

        async def ring(**terms: object) -> list[int]:
            holder = Holder("h", "", msgspec.structs.replace(TERMS, **terms))
            frames = [frame async for frame in ClaimedRuns(store, LedgerMachine(), holder, lambda: 0.0).answer(RUN)]
            commits = [frame.commit for frame in frames if isinstance(frame, Committed)]
            return [result.seq for commit in commits for result in commit.results]

        assert await ring(dtype=made) == [0]
        await send(acceptor, Step(1, "optim_step", b"{}"))
        before = await store.list("")
        with pytest.raises(OtherDtype) as refused:
            await ring(dtype=other)
        assert str(refused.value) == (
            f"{RUN} was made in {made}, and this engine computes in {other}. Its operations are stored and wait for "
            f"one that is started with KNAPPER_DTYPE={made} (knapper up --dtype {made}); or go on from one of its "
            "checkpoints in a new run"
        )
        assert await store.list("") == before, "no claim, no fence, no answer"
        assert await ring(dtype=made, threads=7, versions="torch 9", device="cpu other") == [1]

    asyncio.run(story())


def test_a_slice_ends_though_the_clock_of_the_day_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "slice_s", 0.0)
    back = itertools.count(1e9, -3600.0)

    async def story() -> None:
        store = MemoryStore()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for seq in range(1, 5):
            await send(acceptor, Step(seq, "optim_step", b"{}"))
        runs = ClaimedRuns(store, LedgerMachine(), Holder("h", "", TERMS), lambda: next(back))
        frames = [frame async for frame in runs.answer(RUN)]
        assert [frame.more for frame in frames if isinstance(frame, Done)] == [True]
        assert not [frame for frame in frames if isinstance(frame, Committed)], "the slice was over before it began"

    asyncio.run(story())


class Slow(LedgerMachine):
    """Counts how many operations it works on at once."""

    at_once = most = 0

    async def apply(self, state: LedgerState, operation: Operation, source: Files | None) -> Outcome[LedgerState]:
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.05)
        self.at_once -= 1
        return await super().apply(state, operation, source)


def test_a_reader_that_is_cancelled_at_every_await_lets_nobody_in_before_the_work_has_ended() -> None:
    """As a server does with a connection that broke: its cancellation comes again until the task has ended."""

    async def story() -> None:
        store, machine = MemoryStore(), Slow()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for seq in range(1, 9):
            await send(acceptor, Step(seq, "optim_step", b"{}"))
        runs = ClaimedRuns(store, machine, Holder("h", "", TERMS), lambda: 0.0)

        async def read() -> None:
            async for _ in runs.answer(RUN):
                pass

        for _ in range(3):
            reader = asyncio.ensure_future(read())
            await asyncio.sleep(0.03)
            while not reader.done():
                reader.cancel()
                await asyncio.sleep(0)
        await read()
        assert machine.most == 1
        answered = [
            result.seq
            for name in await store.list(layout.commits(RUN))
            for result in decode(await store.get(name) or b"", Commit, name).results
        ]
        assert answered == list(range(9))

    asyncio.run(story())


# -- when snapshots are taken ------------------------------------------------------------------------------------------


class Costly(LedgerMachine):
    """Every operation takes `cost_s` of compute, and its state is `size` bytes."""

    def __init__(self, cost_s: float, size: int = 0) -> None:
        self.cost_s, self.size = cost_s, size

    async def apply(self, state: LedgerState, operation: Operation, source: Files | None) -> Outcome[LedgerState]:
        outcome = await super().apply(state, operation, source)
        return replace(outcome, cost_s=self.cost_s)

    def serialized_bytes(self, state: LedgerState) -> int:
        return self.size


async def taken(machine: Costly, doorbells: int, idle_s: float = 0.0) -> tuple[list[int], int]:
    """After which operations snapshots were taken, of one operation per doorbell; and how many are left."""
    store = MemoryStore()
    acceptor = Acceptor(store, lambda: 0.0)
    await acceptor.create(CREATION, b"create")
    runs = ClaimedRuns(store, machine, Holder("h", "", TERMS), lambda: 0.0, idle_s=idle_s)
    for seq in range(1, doorbells + 1):
        await send(acceptor, Step(seq, "optim_step", b"{}"))
        async for _ in runs.answer(RUN):
            pass
        for _ in range(20):  # what goes on in the background
            await asyncio.sleep(0)
        while idle_s and runs.loaded:  # noqa: ASYNC110  nothing signals that a run was unloaded
            await asyncio.sleep(0.001)
    listed = await store.list(layout.manifests(RUN))
    seqs = {decode(await store.get(name) or b"", Manifest, name).snapshot_seq for name in listed}
    left = {name.rpartition("/")[0] for name in await store.list(layout.snapshots(RUN))}
    return sorted(seqs - {-1}), len(left)


@pytest.mark.parametrize(
    ("cost_s", "after"),
    [
        (1.0, [27, 58, 89]),  # in the background, so early that it is stored before the 30 s are used up
        (9.0, [3, 7, 11, 15, 19]),
        (18.0, [2, 4, 6, 8, 10, 12, 14]),  # an optimizer step of the default model on a slow machine: every other
        (40.0, [1, 2, 3, 4]),  # the budget is less than one operation
    ],
)
def test_a_snapshot_is_taken_when_the_budget_asks_for_it_and_two_are_left(cost_s: float, after: list[int]) -> None:
    seqs, left = asyncio.run(taken(Costly(cost_s), after[-1]))
    assert seqs == after
    assert left == min(len(after), 2)


@pytest.mark.parametrize(
    ("cost_s", "size", "after"),
    [
        (2.0, 0, [1, 2, 3, 4, 5, 6]),  # free to store
        (2.0, 5 * limits.snapshot_bytes_per_replay_s, [3, 6]),  # six seconds of replay are worth five of bytes
        (2.0, 10**12, []),  # never worth it below half a budget
        (7.0, 10**12, [3, 6]),  # and always above that, which bounds the wait for a restored run
    ],
)
def test_a_run_that_rests_is_stored_if_its_replay_is_worth_more_than_its_bytes(
    cost_s: float, size: int, after: list[int]
) -> None:
    assert asyncio.run(taken(Costly(cost_s, size), 6, idle_s=0.001))[0] == after


def test_a_snapshot_in_the_background_that_comes_in_time_makes_the_forced_one_needless() -> None:
    """The budget is used up while it is stored: nothing more is applied until then, and one snapshot is enough."""

    class SlowStore(MemoryStore):
        async def put_if_absent(self, name: str, data: bytes) -> bool:
            if name.startswith(layout.snapshots(RUN)):
                await asyncio.sleep(0.05)
            return await super().put_if_absent(name, data)

    async def story() -> None:
        store = SlowStore()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for seq in range(1, 41):
            await send(acceptor, Step(seq, "optim_step", b"{}"))
        runs = ClaimedRuns(store, Costly(1.0), Holder("h", "", TERMS), lambda: 0.0)
        async for _ in runs.answer(RUN):
            pass
        manifests = await store.list(layout.manifests(RUN))
        assert len(manifests) == 2, "the claim, and one snapshot"

    asyncio.run(story())


class Large(LedgerMachine):
    """States of 100 bytes."""

    def serialized_bytes(self, state: LedgerState) -> int:
        return 100


@pytest.mark.parametrize(("bytes_max", "stay"), [(None, 3), (300, 3), (250, 2), (50, 1)])
def test_states_in_memory_are_held_to_their_bytes_the_least_recently_used_go(bytes_max: int | None, stay: int) -> None:
    async def story() -> None:
        store = MemoryStore()
        acceptor = Acceptor(store, lambda: 0.0)
        names = [RunId(f"{RUN[:-1]}{n}") for n in range(3)]
        for name in names:
            creation = msgspec.structs.replace(CREATION, spec=msgspec.structs.replace(CREATION.spec, run=name))
            await acceptor.create(creation, b"create")
        runs = ClaimedRuns(store, Large(), Holder("h", "", TERMS), lambda: 0.0, bytes_max=bytes_max)
        for name in names:
            assert [frame async for frame in runs.answer(name)]
        assert runs.loaded == stay
        epochs = []
        for name in reversed(names):  # the newest are still there, and are not claimed again
            frames = [frame async for frame in runs.answer(name)]
            epochs.append(frames[0].epoch)  # type: ignore[union-attr]  # a slice begins with its claim
        assert epochs == [1] * stay + [2] * (3 - stay)

    asyncio.run(story())


def test_the_state_before_a_commit_counts_until_the_commit_is_stored() -> None:
    seen: list[int] = []

    class Watched(MemoryStore):
        async def put_if_absent(self, name: str, data: bytes) -> bool:
            if name.startswith(layout.commits(RUN)) and runs.loaded:
                seen.append(runs._bytes)
            return await super().put_if_absent(name, data)

    store = Watched()
    runs = ClaimedRuns(store, Large(), Holder("h", "", TERMS), lambda: 0.0)

    async def story() -> None:
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for seq in range(1, 4):
            await send(acceptor, Step(seq, "optim_step", b"{}"))
        assert [frame async for frame in runs.answer(RUN)]

    asyncio.run(story())
    created, *later = seen  # before the first commit nothing is durable
    assert created == 100
    assert later
    assert min(later) >= 200, "what is durable, and what came after it"
    assert runs._bytes == 100, "everything is stored"
