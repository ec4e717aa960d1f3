"""A claimed run by itself: how its commits are cut, when it wants a snapshot, what it does with failures."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from knapper import limits
from knapper.errors import Corrupt, Fenced, NotFound, OtherDtype, OutOfMemory, Unavailable
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal import ends
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.holder import Holder
from knapper.state.journal.machine import Files, Outcome
from knapper.state.journal.records import Commit, End, Kind, Manifest, Operation, Result, decode, encode
from knapper.state.journal.replay import Replay
from knapper.state.journal.run import Run
from knapper.store.memory import MemoryStore
from tests.sim.history import CREATION, RUN, TERMS
from tests.sim.ledger import SIZE, LedgerMachine, LedgerState

ROW = np.ones(SIZE, np.float32).tobytes()
SERIALIZED_BYTES = 4 * 4 * SIZE + 8  # of a state of the ledger


class Machine(LedgerMachine):
    """The ledger, whose next steps fail with `failures`; each takes `took_s` of the bench's clock."""

    def __init__(self, bench: "Bench") -> None:
        self.failures: list[Exception] = []
        self.bench, self.took_s, self.serialized = bench, 0.0, SERIALIZED_BYTES

    async def apply(self, state: LedgerState, operation: Operation, source: object) -> Outcome[LedgerState]:
        self.bench.now += self.took_s
        if self.failures:
            raise self.failures.pop(0)
        return await super().apply(state, operation, source)  # type: ignore[arg-type]

    def serialized_bytes(self, state: LedgerState) -> int:
        return self.serialized


class Bench:
    def __init__(self) -> None:
        self.store, self.now, self.published = MemoryStore(), 100.0, list[tuple[int, Commit]]()
        self.acceptor, self.machine = Acceptor(self.store, lambda: self.now), Machine(self)

    async def send(self, *bodies: bytes) -> None:
        for seq, body in enumerate(bodies, 1):
            kind: Kind = "optim_step" if body == b"{}" else "forward_backward"
            await self.acceptor.accept(RUN, seq, kind, pack(body))

    async def claim(self, name: str = "h", **terms: object) -> Run[LedgerState]:
        holder = Holder(name, f"{name}:1", msgspec.structs.replace(TERMS, **terms))
        return await Run.claim(self.store, RUN, self.machine, holder, lambda: self.now)

    async def publish(self, n: int, commit: Commit) -> None:
        self.published.append((n, commit))

    async def applied(self, run: Run[LedgerState], stop: Callable[[], bool] = lambda: False) -> bool:
        return await run.apply_pending(stop, self.publish)

    def cut(self) -> list[list[int]]:
        """The operations of each commit."""
        return [[result.seq for result in commit.results] for _, commit in self.published]

    def answer(self, seq: int) -> dict[str, object]:
        [result] = [result for _, commit in self.published for result in commit.results if result.seq == seq]
        content: dict[str, object] = json.loads(result.body)
        return {**content, "failed": result.failed, "content": result.content_type}


def story(scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def tell() -> None:
        bench = Bench()
        await bench.acceptor.create(CREATION, b"create")
        await scenario(bench)

    asyncio.run(tell())


# ---- claims


def test_a_claim_writes_who_holds_the_run_and_a_fence() -> None:
    async def scenario(bench: Bench) -> None:
        for n in (1, 2):
            run = await bench.claim(f"h{n}", threads=n)
            data = await bench.store.get(layout.manifest(RUN, n))
            manifest = Manifest(
                epoch=n, holder=f"h{n}", address=f"h{n}:1", claimed_at=100.0,
                terms=msgspec.structs.replace(TERMS, threads=n),
            )  # fmt: skip
            assert decode(data or b"", Manifest, "m") == manifest == run.manifest
            assert (run.epoch, run.manifest_n, run.applied, run.out) == (n, n, -1, n)
            fence = decode(await bench.store.get(layout.commit(RUN, n)) or b"", Commit, "c")
            assert fence == Commit(epoch=n, results=[])
            assert run.terms_before == (None if n == 1 else msgspec.structs.replace(TERMS, threads=1))
        assert (await bench.claim("h3", threads=2)).terms_before is None

    story(scenario)


def test_what_cannot_be_claimed_is_refused_and_nothing_is_written() -> None:
    async def scenario(bench: Bench) -> None:
        other = RunId(f"{RUN}1")
        with pytest.raises(NotFound, match="does not exist; create one"):
            await Run.claim(bench.store, other, bench.machine, Holder("h", "", TERMS), lambda: 0.0)
        assert await bench.store.list(layout.manifests(other)) == []
        await bench.claim()
        before = await bench.store.list("")
        with pytest.raises(OtherDtype, match=r"was made in float32, and this engine computes in bfloat16") as refused:
            await bench.claim("other", dtype="bfloat16")
        assert refused.value.retry_after_s == 30.0
        assert await bench.store.list("") == before
        await ends.end(bench.store, RUN, End(reason="deleted", tenant="local", at=0.0))
        with pytest.raises(NotFound, match="was deleted"):
            await bench.claim("late")
        await bench.store.delete(layout.operation(RUN, 0))
        with pytest.raises(NotFound, match="was deleted"):
            await bench.claim("later")

    story(scenario)


def test_an_earlier_holder_loses_its_slot_and_knows_it() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        early = await bench.claim("early")
        late = await bench.claim("late")
        with pytest.raises(Fenced, match=r"slot 2 of .* was taken by another claim"):
            await bench.applied(early)
        assert bench.published == []
        assert not await bench.applied(late)
        assert bench.cut() == [[0], [1]]

    story(scenario)


def test_an_earlier_holder_stores_no_snapshot() -> None:
    async def scenario(bench: Bench) -> None:
        early = await bench.claim("early")
        assert not await bench.applied(early)
        await bench.claim("late")
        with pytest.raises(Fenced, match=f"{RUN} went on without this claim, of epoch 1"):
            await early.snapshot()
        assert await bench.store.list(layout.snapshots(RUN)) == []

    story(scenario)


@pytest.mark.parametrize("damage", ["missing", "order", "sha256"])
def test_a_record_that_does_not_follow_is_damage(damage: str) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", b"{}")
        run = await bench.claim()
        bench.machine.took_s = 1.0
        assert not await bench.applied(run)
        assert bench.cut() == [[0], [1], [2]]
        name = layout.commit(RUN, 4)
        commit = decode(await bench.store.get(name) or b"", Commit, name)
        changes: dict[str, dict[str, Any]] = {"order": {"seq": 3}, "sha256": {"sha256": b"other"}, "missing": {}}
        await bench.store.delete(name if damage != "missing" else layout.commit(RUN, 3))
        if damage != "missing":
            result = msgspec.structs.replace(commit.results[0], **changes[damage])
            await bench.store.put_if_absent(name, encode(msgspec.structs.replace(commit, results=[result])))
        said = {
            "missing": f"{layout.commit(RUN, 3)} is missing, although record 4",
            "sha256": "operation 2 .* not the one that",
            "order": "record 4 of .* answers operation 3, after 1",
        }[damage]  # fmt: skip
        with pytest.raises(Corrupt, match=said):
            await bench.claim("again")

    story(scenario)


@pytest.mark.parametrize("changes", [{"seq": 2}, {"run": f"{RUN}1"}])
def test_an_operation_under_the_name_of_another_is_damage(changes: dict[str, Any]) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()
        name = layout.operation(RUN, 1)
        operation = decode(await bench.store.get(name) or b"", Operation, name)
        await bench.store.delete(name)
        await bench.store.put_if_absent(name, encode(msgspec.structs.replace(operation, **changes)))
        with pytest.raises(Corrupt, match=f"object {name} is damaged: fields run and seq say that it is operation"):
            await bench.applied(run)

    story(scenario)


# ---- commits


def test_a_pass_shares_the_commit_of_its_step_and_nothing_else_waits() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(ROW, b"{}", ROW, ROW, b"{}", b"{}")
        run = await bench.claim()
        bench.machine.took_s = 0.03
        assert not await bench.applied(run)
        assert bench.cut() == [[0], [1, 2], [3], [4, 5], [6]]
        assert [n for n, _ in bench.published] == [2, 3, 4, 5, 6]
        assert [commit.committed_at for _, commit in bench.published] == pytest.approx(
            [100.0, 100.06, 100.09, 100.15, 100.18]
        )
        assert [commit.device_s for _, commit in bench.published] == [0.0, 10.0, 9.0, 10.0, 1.0]
        assert {commit.epoch for _, commit in bench.published} == {1}
        assert (run.applied, run.out) == (6, 6)

    story(scenario)


class Gated(MemoryStore):
    """Stores each commit when it may; `open` says how many more at once."""

    def __init__(self) -> None:
        super().__init__()
        self.doors = asyncio.Semaphore(1000)
        self.waiting = list[str]()
        self.refuse = 0  # so many attempts at a commit fail

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        if not name.startswith(layout.commits(RUN)):
            return await super().put_if_absent(name, data)
        self.waiting.append(name)
        await self.doors.acquire()
        self.waiting.remove(name)
        if self.refuse:
            self.refuse -= 1
            raise Unavailable("not now")
        return await super().put_if_absent(name, data)


def gated(scenario: Callable[[Bench, Gated], Awaitable[None]]) -> None:
    async def tell() -> None:
        bench = Bench()
        bench.store = store = Gated()
        bench.acceptor = Acceptor(store, lambda: bench.now)
        await bench.acceptor.create(CREATION, b"create")
        await scenario(bench, store)

    asyncio.run(tell())


async def until_still() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def test_operations_go_on_while_a_commit_is_stored_and_their_results_share_the_next() -> None:
    """Eight results at most are in memory only, and no one has seen any of them."""

    async def scenario(bench: Bench, store: Gated) -> None:
        await bench.send(*[b"{}"] * 20)
        run = await bench.claim()
        store.doors = asyncio.Semaphore(0)
        slice_ = asyncio.create_task(bench.applied(run))
        await until_still()
        assert (run.applied, store.waiting, bench.published) == (7, [layout.commit(RUN, 2)], [])
        assert await store.list(layout.commits(RUN)) == [layout.commit(RUN, 1)]
        store.doors.release()
        await until_still()
        assert (run.applied, store.waiting) == (8, [layout.commit(RUN, 3)])
        assert bench.cut() == [[0]], "one commit at a time"
        store.doors.release()
        await until_still()
        assert bench.cut() == [[0], [*range(1, 8)]]
        for _ in range(20):
            store.doors.release()
        assert not await slice_
        assert [seq for cut in bench.cut() for seq in cut] == list(range(21)), "each once, in order"
        assert run.state is not None
        assert run.state.step == 20

    gated(scenario)


def test_the_next_operation_is_read_while_one_is_applied() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", b"{}")
        run = await bench.claim()
        read = list[str]()
        got = bench.store.get

        async def noted(name: str) -> bytes | None:
            read.append(name)
            return await got(name)

        class Looking(Machine):
            async def apply(self, state: LedgerState, operation: Operation, source: object) -> Outcome[LedgerState]:
                await until_still()
                assert {layout.operation(RUN, operation.seq + n) for n in (1, 2)} <= set(read)
                return await super().apply(state, operation, source)

        bench.store.get = noted  # type: ignore[method-assign]
        run._applier._machine = Looking(bench)
        assert not await bench.applied(run)
        assert [read.count(layout.operation(RUN, seq)) for seq in (1, 2)] == [1, 1]
        assert len(read) < 10, "what is not there is looked for again, and not for ever"

    story(scenario)


def test_what_came_after_it_was_looked_for_is_found() -> None:
    """The second operation is accepted while the first is applied, which has looked for it in vain."""

    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()

        class Accepting(Machine):
            async def apply(self, state: LedgerState, operation: Operation, source: object) -> Outcome[LedgerState]:
                await until_still()
                await bench.acceptor.accept(RUN, 2, "optim_step", pack(b"{}"))
                return await super().apply(state, operation, source)

        run._applier._machine = Accepting(bench)
        assert not await bench.applied(run)
        assert run.applied == 2

    story(scenario)


@pytest.mark.parametrize(("bytes_max", "ahead"), [(10, 1), (20, 2), (limits.commit_inline_bytes_max, 7)])
def test_results_that_wait_for_a_commit_have_so_many_bytes(
    bytes_max: int, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers are 77, 10 and 10 bytes."""
    monkeypatch.setattr(limits, "commit_inline_bytes_max", bytes_max)

    async def scenario(bench: Bench, store: Gated) -> None:
        await bench.send(*[b"{}"] * 9)
        run = await bench.claim()
        store.doors = asyncio.Semaphore(0)
        slice_ = asyncio.create_task(bench.applied(run))
        await until_still()
        assert run.applied == ahead
        assert len(store.waiting) == 1
        for _ in range(20):
            store.doors.release()
        assert not await slice_
        assert bench.answer(0) == {
            "type": "create_model",
            "model_id": RUN,
            "failed": False,
            "content": "application/json",
        }
        assert [seq for cut in bench.cut() for seq in cut] == list(range(10))

    gated(scenario)


def test_who_is_told_to_stop_commits_what_it_has_and_says_that_more_waits() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", b"{}")
        run, asked = await bench.claim(), iter([False, False, True])
        assert await bench.applied(run, lambda: next(asked))
        assert bench.cut() == [[0], [1]]
        assert await bench.applied(run, lambda: True)
        assert bench.cut() == [[0], [1]]
        assert not await bench.applied(run)
        assert bench.cut() == [[0], [1], [2]]

    story(scenario)


def test_what_could_not_be_stored_is_stored_first_when_it_goes_on() -> None:
    async def scenario(bench: Bench, store: Gated) -> None:
        await bench.send(b"{}", b"{}")
        run = await bench.claim()
        store.refuse = 1
        with pytest.raises(Unavailable):
            await bench.applied(run)
        assert bench.published == []
        ahead = run.applied
        assert ahead > 0, "it went on while the commit was being stored"
        store.refuse = 1
        with pytest.raises(Unavailable):
            await bench.applied(run)
        assert (bench.published, run.applied) == ([], ahead), "nothing more is applied before that"
        assert not await bench.applied(run)
        assert bench.cut()[0] == [0]
        assert [seq for cut in bench.cut() for seq in cut] == [0, 1, 2]
        assert run.state is not None
        assert run.state.step == 2, "each was applied once"

    gated(scenario)


def test_no_work_ahead_of_a_lost_claim_is_seen_by_anyone() -> None:
    async def scenario(bench: Bench, store: Gated) -> None:
        save = msgspec.json.encode({"model_id": RUN, "seq_id": 3, "path": "mine"})
        await bench.send(ROW, b"{}")
        await bench.acceptor.accept(RUN, 3, "save_weights", pack(save))
        early = await bench.claim("early")
        store.doors = asyncio.Semaphore(0)
        slice_ = asyncio.create_task(bench.applied(early))
        await until_still()
        assert early.applied == 2, "its save waits for what came before it"
        assert await MemoryStore.put_if_absent(store, store.waiting[0], encode(Commit(epoch=2, results=[])))
        store.doors.release()  # the fence of another claim came first
        with pytest.raises(Fenced):
            await slice_
        assert bench.published == []
        assert await store.list("checkpoints/") == [], "and names nothing"

    gated(scenario)


def test_a_snapshot_beside_work_that_is_ahead_is_of_what_is_durable() -> None:
    async def scenario(bench: Bench, store: Gated) -> None:
        await bench.send(*[b"{}"] * 6)
        run = await bench.claim()
        await bench.applied(run, iter([False, False, False, True]).__next__)
        assert run.applied == 2
        store.doors = asyncio.Semaphore(0)
        slice_ = asyncio.create_task(bench.applied(run))
        await until_still()
        assert run.applied == 6
        await run.snapshot()
        assert (run.manifest.snapshot_seq, run.manifest.snapshot_out) == (2, run.out)
        assert run.replay_cost_s == 4.0
        for _ in range(9):
            store.doors.release()
        assert not await slice_
        assert run.replay_cost_s == 4.0
        await run.snapshot()
        assert (run.manifest.snapshot_seq, run.replay_cost_s, run.replay.bytes) == (6, 0.0, 0)

    gated(scenario)


# ---- failures


def test_a_defect_is_tried_three_times_and_then_answered_as_the_server_s() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", b"{}")
        run = await bench.claim()
        bench.machine.failures = [RuntimeError("boom")] * 3
        for _ in range(2):
            with pytest.raises(Unavailable, match=r"^operation 1 of .* failed: RuntimeError\('boom'\)") as raised:
                await bench.applied(run)
            assert raised.value.retry_after_s == 1.0
            assert (run.applied, run.replay_cost_s, bench.cut()) == (0, 0.0, [[0]]), "what came before it is answered"
        assert not await bench.applied(run)
        assert bench.answer(1) == {
            "error": "operation 1 failed 3 times, by a defect of the server: RuntimeError('boom')",
            "category": "server",
            "failed": True, "content": "application/json",
        }  # fmt: skip
        assert bench.answer(2) == {"step": 1, "failed": False, "content": "application/json"}

    story(scenario)


def test_attempts_are_counted_for_one_operation_at_a_time() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", b"{}")
        run = await bench.claim()
        for failing in (1, 1):
            bench.machine.failures = [RuntimeError("one")] * failing
            with pytest.raises(Unavailable):
                await bench.applied(run)
        assert await bench.applied(run, iter([False, True]).__next__)  # operation 1 is through
        for _ in range(2):
            bench.machine.failures = [RuntimeError("two")]
            with pytest.raises(Unavailable, match="operation 2"):
                await bench.applied(run)
        assert not await bench.applied(run)
        assert bench.answer(2)["step"] == 2

    story(scenario)


def test_memory_that_lacks_three_times_is_told_as_the_user_s() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()
        bench.machine.failures = [OutOfMemory("too long")] * 3
        for _ in range(2):
            with pytest.raises(Unavailable):
                await bench.applied(run)
        assert not await bench.applied(run)
        assert bench.answer(1)["error"] == "operation 1 failed 3 times: too long"
        assert bench.answer(1)["category"] == "user"

    story(scenario)


def test_a_user_s_mistake_is_answered_at_once_and_changes_nothing() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"wrong", b"{}")
        await bench.acceptor.reject(RUN, 3, pack(b"x"), "colour is red")
        run = await bench.claim()
        assert not await bench.applied(run)
        user = {"category": "user", "failed": True, "content": "application/json"}
        assert bench.answer(1) == {"error": "datum 0 is wrong", **user}
        assert bench.answer(3) == {"error": "colour is red", **user}
        again = await bench.claim("again")
        assert (again.applied, again.replay_cost_s) == (3, 1.0)
        assert again.state is not None
        assert run.state is not None
        assert again.state.bytes() == run.state.bytes()

    story(scenario)


def test_what_waits_behind_a_creation_that_failed_is_told_so() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()
        run.applied, run._state = 0, None
        assert not await bench.applied(run)
        assert "was never made: its creation failed" in str(bench.answer(1)["error"])

    story(scenario)


def test_memory_that_lacks_for_a_claim_or_a_snapshot_is_nobody_s_mistake() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()
        await bench.applied(run)
        bench.machine.failures = [OutOfMemory("too long")]
        with pytest.raises(Unavailable, match=f"no memory for {RUN} now: too long") as raised:
            await bench.claim("again")
        assert raised.value.retry_after_s == 5.0

    story(scenario)


# ---- snapshots


@pytest.mark.parametrize(
    ("cost_s", "serialized", "storing_s", "must", "wants", "worth"),
    [
        (30.1, 0, 2.0, True, True, True), (30.0, 0, 2.0, False, True, True), (26.1, 0, 2.0, False, True, True),
        (26.0, 0, 2.0, False, False, True), (15.1, 0, 60.0, False, True, True), (15.0, 0, 60.0, False, False, True),
        (30.0, 0, 0.0, False, False, True), (1.1, 0, 2.0, False, False, True), (1.0, 0, 2.0, False, False, False),
        (4.1, 100 * limits.MIB, 2.0, False, False, True), (4.0, 100 * limits.MIB, 2.0, False, False, False),
        (15.0, 10**10, 2.0, False, False, False), (15.1, 10**10, 2.0, False, False, True),
    ],
)  # fmt: skip
def test_when_a_snapshot_is_due_wanted_and_worth_it(
    cost_s: float, serialized: int, storing_s: float, must: bool, wants: bool, worth: bool
) -> None:
    """The budget is 30 s of replay, 25 MiB are stored to spare one, and a snapshot is begun twice its time ahead."""

    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()
        await bench.applied(run)
        run._replay, run._budget.storing_s, bench.machine.serialized = Replay(cost_s), storing_s, serialized
        assert (run.must_snapshot, run.wants_snapshot, run.worth_snapshot) == (must, wants, worth)

    story(scenario)


@pytest.mark.parametrize(("bytes_", "serialized", "wants"), [
    (limits.MIB // 4, 0, False), (limits.MIB // 4 + 1, 0, True), (limits.MIB, limits.MIB, False),
    (limits.MIB + 1, limits.MIB, True),
])  # fmt: skip
def test_a_snapshot_is_wanted_when_there_is_more_to_read_than_it_is_large(
    bytes_: int, serialized: int, wants: bool
) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()
        await bench.applied(run)
        run._replay, run._outbox.records, bench.machine.serialized = Replay(bytes=bytes_), Replay(), serialized
        assert run.wants_snapshot is wants

    story(scenario)


def test_what_a_recovery_has_to_read_is_counted_by_pages_of_four_kilobytes() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", np.random.default_rng(0).random(SIZE * 1024, np.float32).tobytes())
        run = await bench.claim()
        bench.machine.failures = []
        await bench.applied(run, iter([False, False, True]).__next__)
        assert run.replay.bytes == 4 * 4096, "two operations and their commits"
        again = await bench.claim("again")
        assert again.replay.bytes == 4 * 4096 + 4096, "the same, and the fence between"

    story(scenario)


def test_a_snapshot_is_where_the_next_claim_begins_and_the_one_before_is_remembered() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", b"{}", b"{}")
        run = await bench.claim()
        await bench.applied(run, iter([False, False, True]).__next__)
        assert not (await bench.claim("first")).worth_snapshot
        run = await bench.claim("second")
        bench.now = 200.0
        await run.snapshot()
        first = layout.snapshot(RUN, 1, run.epoch)
        assert (run.manifest.snapshot, run.manifest.snapshot_seq, run.manifest.snapshot_out) == (first, 1, run.out)
        assert (run.replay_cost_s, run.replay.bytes, run.manifest_n) == (0.0, 0, 4)
        assert not run.worth_snapshot
        n = run.manifest_n
        await run.snapshot()
        assert run.manifest_n == n, "nothing new: no other snapshot"
        await bench.applied(run)
        assert run.replay_cost_s == 2.0
        await run.snapshot()
        found = run.manifest
        assert (found.snapshot, found.snapshot_seq) == (layout.snapshot(RUN, 3, run.epoch), 3)
        assert (found.snapshot_before, found.snapshot_before_seq, found.snapshot_before_out) == (first, 1, run.out - 2)
        again = await bench.claim("again")
        assert (again.applied, again.replay_cost_s) == (3, 0.0)
        assert again.manifest.snapshot_before == first
        assert again.state is not None
        assert run.state is not None
        assert again.state.bytes() == run.state.bytes()

    story(scenario)


@pytest.mark.parametrize(("cost_s", "wants"), [(26.0, False), (26.1, True)])
def test_before_the_first_snapshot_it_is_thought_to_take_two_seconds(cost_s: float, wants: bool) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()
        await bench.applied(run)
        run._replay = Replay(cost_s)
        assert run.wants_snapshot is wants

    story(scenario)


def test_what_a_snapshot_spares_is_spared_after_a_failure_too() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", b"{}", b"{}")
        run = await bench.claim()
        await bench.applied(run, iter([False, False, True]).__next__)
        await run.snapshot()
        bench.machine.failures = [RuntimeError("boom")]
        with pytest.raises(Unavailable):
            await bench.applied(run)
        assert (run.applied, run.replay_cost_s, run.replay.bytes) == (1, 0.0, 0)

    story(scenario)


def test_a_snapshot_beside_which_operations_went_on_leaves_what_they_cost() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}", b"{}", b"{}")
        run = await bench.claim()
        await bench.applied(run, iter([False, False, True]).__next__)

        class Beside(Machine):
            async def serialize(self, state: LedgerState) -> Files:
                assert not await bench.applied(run)
                bench.now += 3.0
                return await super().serialize(state)

        run._machine = Beside(bench)
        await run.snapshot()
        assert (run.applied, run.manifest.snapshot_seq, run.replay_cost_s) == (3, 1, 2.0)
        assert run.replay.bytes == 4 * 4096, "two operations and their commits"
        assert run._budget.storing_s == 3.0

    story(scenario)


def test_a_run_that_was_ended_stores_no_snapshot_and_takes_back_what_it_wrote() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(b"{}")
        run = await bench.claim()
        await bench.applied(run)
        await ends.end(bench.store, RUN, End(reason="deleted", tenant="local", at=0.0))
        with pytest.raises(Fenced, match="was ended"):
            await run.snapshot()
        assert await bench.store.list(layout.snapshots(RUN)) == []

    story(scenario)


def test_a_run_that_is_ended_while_its_snapshot_is_stored_takes_it_back() -> None:
    class Ending(MemoryStore):
        armed = False

        async def put_if_absent(self, name: str, data: bytes) -> bool:
            won = await super().put_if_absent(name, data)
            if self.armed and name.startswith(layout.manifests(RUN)):
                self.armed = False
                await ends.end(self, RUN, End(reason="deleted", tenant="local", at=0.0))
            return won

    async def scenario() -> None:
        bench = Bench()
        bench.store = store = Ending()
        bench.acceptor = Acceptor(store, lambda: bench.now)
        await bench.acceptor.create(CREATION, b"create")
        await bench.send(b"{}")
        run = await bench.claim()
        await bench.applied(run)
        store.armed = True
        with pytest.raises(Fenced, match="was ended"):
            await run.snapshot()
        assert await store.list(layout.snapshots(RUN)) == []

    asyncio.run(scenario())


def test_two_slices_of_one_run_are_a_defect() -> None:
    async def scenario(bench: Bench) -> None:
        run = await bench.claim()

        async def publish(_n: int, _commit: Commit) -> None:
            with pytest.raises(AssertionError, match="two slices"):
                await bench.applied(run)

        assert not await run.apply_pending(lambda: False, publish)
        assert not await bench.applied(run)

    story(scenario)


def test_a_result_carries_the_hash_of_its_operation() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.send(ROW)
        await bench.applied(await bench.claim())
        results: list[Result] = [result for _, commit in bench.published for result in commit.results]
        assert [result.sha256 for result in results] == [pack(b"create").sha256, pack(ROW).sha256]
        assert [result.source for result in results] == ["", ""]

    story(scenario)
