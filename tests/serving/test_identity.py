"""A copy of a process that nobody told that it is one notices by itself, and claims anew."""

import asyncio

import pytest

from knapper.errors import NotHolder
from knapper.events.cloudevents import Claimed, Committed
from knapper.serving.identity import ProcessIdentity
from knapper.serving.runs import ClaimedRuns
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.holder import Holder
from knapper.store.memory import MemoryStore
from tests.sim.history import CREATION, RUN, TERMS, Step, send
from tests.sim.ledger import LedgerMachine


class World:
    """Where a process is, and what its clocks show."""

    place, wall_s, monotonic_s = "here", 1e9, 100.0


def identity(world: World) -> ProcessIdentity:
    return ProcessIdentity(lambda: world.wall_s, lambda: world.monotonic_s, lambda: world.place)


@pytest.mark.parametrize(
    ("place", "wall_s", "monotonic_s", "moved"),
    [
        ("here", 0.0, 0.0, False),
        ("here", 9000.0, 9000.0, False),  # SIGSTOP: both clocks go on, and the claim may still be its own
        ("here", 5.0, 0.0, False),  # the wall clock was set
        ("here", 3600.0, 0.0, True),  # an image that goes on an hour later
        ("here", -3600.0, 0.0, True),
        ("there", 0.0, 0.0, True),  # at once, elsewhere
    ],
)
def test_a_process_knows_whether_its_memory_has_moved(
    place: str, wall_s: float, monotonic_s: float, moved: bool
) -> None:
    world = World()
    own = identity(world)
    before = own.name
    world.place, world.wall_s, world.monotonic_s = place, world.wall_s + wall_s, world.monotonic_s + monotonic_s
    assert own.moved == moved
    assert own.renew() != before
    assert not own.moved


def test_a_copy_claims_anew_before_it_writes_anything() -> None:
    world, store = World(), MemoryStore()
    own = identity(world)

    def holder() -> Holder:
        return Holder(own.renew(), "", TERMS)

    async def story() -> None:
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        runs = ClaimedRuns(
            store, LedgerMachine(), holder(), lambda: 0.0, renewed=lambda: holder() if own.moved else None
        )
        frames = []
        for seq in (1, 2, 3):
            await send(acceptor, Step(seq, "optim_step", b"{}"))
            world.place = "there" if seq == 3 else "here"
            frames += [frame async for frame in runs.answer(RUN)]
        claims = [frame for frame in frames if isinstance(frame, Claimed)]
        assert [claim.epoch for claim in claims] == [1, 1, 2]
        assert claims[0].holder == claims[1].holder != claims[2].holder
        commits = [frame.commit for frame in frames if isinstance(frame, Committed)]
        assert [result.seq for commit in commits for result in commit.results] == [0, 1, 2, 3]

    asyncio.run(story())


def test_a_quiesced_process_holds_no_state_and_refuses_until_it_goes_on() -> None:
    async def story() -> None:
        store = MemoryStore()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        runs = ClaimedRuns(store, LedgerMachine(), Holder("before", "", TERMS), lambda: 0.0)
        assert [frame async for frame in runs.answer(RUN)]
        assert runs.loaded == 1
        await runs.quiesce()
        assert runs.loaded == 0
        with pytest.raises(NotHolder, match="leaving"):
            await anext(runs.answer(RUN))
        runs.resume(Holder("after", "", TERMS))
        first = await anext(runs.answer(RUN))
        assert isinstance(first, Claimed)
        assert (first.epoch, first.holder.partition("/")[0]) == (2, "after")

    asyncio.run(story())
