"""A claimed run: what is forced, whatever else goes on."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import numpy as np

from knapper.state import layout, usage
from knapper.state.journal.accept import Acceptor, newest_manifest
from knapper.state.journal.holder import Holder
from knapper.state.journal.newest import Manifests
from knapper.state.journal.records import Commit
from knapper.state.journal.run import Run
from knapper.store.memory import MemoryStore
from tests.sim.history import CREATION, RUN, TERMS, Step, send
from tests.sim.ledger import SIZE, LedgerMachine


class Interrupted(MemoryStore):
    """Does something else just before a commit is stored."""

    before_commit: Callable[[], Awaitable[None]] | None = None

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.before_commit is not None and name.startswith(layout.commits(RUN)):
            meanwhile, self.before_commit = self.before_commit, None
            await meanwhile()
        return await super().put_if_absent(name, data)


async def nothing(_n: int, _commit: Commit) -> None:
    return None


def body(**fields: object) -> bytes:
    return msgspec.json.encode({"model_id": RUN, **fields})


def test_a_load_forces_a_snapshot_though_another_was_taken_before_its_commit() -> None:
    async def story() -> None:
        store = Interrupted()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        await send(acceptor, Step(1, "save_weights", body(seq_id=1, path="mine")))
        holder = Holder("h", "", TERMS)
        run = await Run.claim(store, RUN, LedgerMachine(), holder, lambda: 0.0)
        assert not await run.apply_pending(lambda: False, nothing)

        load = body(seq_id=2, path=f"tinker://{RUN}/weights/mine", optimizer=True)
        await send(acceptor, Step(2, "load_weights", load))
        store.before_commit = run.snapshot  # in the background: of operation 1, for operation 2 is not committed yet
        assert await run.apply_pending(lambda: False, nothing), "it stops for a snapshot"
        assert run.must_snapshot
        again = await Run.claim(store, RUN, LedgerMachine(), Holder("h2", "", TERMS), lambda: 0.0)
        assert again.must_snapshot, "a recovery owes it as well"
        await again.snapshot()
        assert not again.must_snapshot
        newest = await newest_manifest(store, RUN)
        assert newest is not None
        assert newest[1].snapshot_seq == 2

    asyncio.run(story())


def test_what_a_run_takes_in_memory_counts_the_state_that_waits_for_its_commit() -> None:
    async def story() -> None:
        store = Interrupted()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("h", "", TERMS), lambda: 0.0)
        assert not await run.apply_pending(lambda: False, nothing)
        alone = run.state_bytes
        assert alone > 0
        await send(acceptor, Step(1, "optim_step", body(seq_id=1)))
        seen: list[int] = []

        async def look() -> None:
            seen.append(run.state_bytes)

        store.before_commit = look
        assert not await run.apply_pending(lambda: False, nothing)
        assert seen == [2 * alone], "the state before the commit, and the one after it"
        assert run.state_bytes == alone

    asyncio.run(story())


def test_a_process_remembers_what_it_claimed() -> None:
    async def story() -> None:
        store = MemoryStore()
        manifests = Manifests(store)
        await Acceptor(store, lambda: 0.0).create(CREATION, b"create")
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("h", "", TERMS), lambda: 7.0, manifests)
        stored = await newest_manifest(store, RUN)
        assert stored is not None
        assert (stored[0], stored[1].epoch, stored[1].claimed_at) == (1, run.epoch, 7.0)
        assert manifests.seen(RUN) == stored

    asyncio.run(story())


def test_what_results_cost_the_device_is_told_once_whoever_computes_them_again() -> None:
    """In the commits themselves: nine seconds for each forward_backward of this machine, also after two replays."""

    async def story() -> None:
        store, now = MemoryStore(), 7200.0
        acceptor = Acceptor(store, lambda: now)
        await acceptor.create(CREATION, b"create")
        row = np.ones(SIZE, np.float32).tobytes()
        for holder, seq in (("one", 1), ("two", 2), ("three", 3)):
            await send(acceptor, Step(seq, "forward_backward", b"wrong" if seq == 2 else row))
            run = await Run.claim(store, RUN, LedgerMachine(), Holder(holder, "", TERMS), lambda: now)
            assert not await run.apply_pending(lambda: False, nothing)
            assert run.replay_cost_s == (9.0 if seq < 3 else 18.0), "what was computed again"
        seconds = await usage.device_seconds(store, [RUN], usage.Window(2, 3))
        assert seconds == {(2, RUN): 18.0}
        assert await usage.device_seconds(store, [RUN], usage.Window(0, 2)) == {}

    asyncio.run(story())
