"""Two copies of one process, as a memory image that is restored twice: equal names, clocks and generators.

A fork is such a copy. Neither may lose or repeat an operation, and one claim has one holder.
"""

import asyncio
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from knapper.errors import Fenced
from knapper.state import layout
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, decode
from knapper.state.journal.run import Run
from knapper.store.directory import DirectoryStore
from tests.sim.history import CREATION, RUN, TERMS, Step, send
from tests.sim.ledger import LedgerMachine, LedgerState

STEPS = 12
WAITING = [0, 1, 5, 11]  # operations that are applied before the image is made


class Meeting(DirectoryStore):
    """Both copies write each object at the same time, as long as both are alive."""

    def __init__(self, root: Path, meetings: Path) -> None:
        super().__init__(root)
        self._meetings = meetings

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        place = name.replace("/", "_")
        (self._meetings / f"{place}@{os.getpid()}").touch()
        for _ in range(40):
            if len(list(self._meetings.glob(f"{place}@*"))) > 1:
                break
            await asyncio.sleep(0.005)
        return await super().put_if_absent(name, data)


async def _nothing(_: int, __: Commit) -> None:
    pass


async def _work(run: Run[LedgerState]) -> None:
    while await run.apply_pending(lambda: False, _nothing):
        await run.snapshot()


def _in_a_copy(work: Callable[[], None]) -> int:
    """The process that does it, in a copy of this one's memory. Exit status 0: done, 3: fenced, 1: anything else."""
    if process := os.fork():
        return process
    status = 1
    try:
        work()
        status = 0
    except Fenced:
        status = 3
    except BaseException:  # noqa: BLE001  told by the exit status
        traceback.print_exc()
    finally:
        os._exit(status)


def _statuses(*processes: int) -> list[int]:
    return sorted(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes)


PLAN = [Step(seq, "optim_step" if seq % 3 == 0 else "forward_backward", bytes(32)) for seq in range(1, STEPS + 1)]


@pytest.fixture
def store(tmp_path: Path) -> Meeting:
    (tmp_path / "meetings").mkdir()
    return Meeting(tmp_path / "store", tmp_path / "meetings")


async def image(store: Meeting, before: int) -> Run[LedgerState]:
    """A run, the first operations applied by this process, which holds it; the others wait in the store."""
    calm = DirectoryStore(store._root)
    acceptor = Acceptor(calm, lambda: 0.0)
    await acceptor.create(CREATION, b"create")
    for step in PLAN[:before]:
        await send(acceptor, step)
    run = await Run.claim(calm, RUN, LedgerMachine(), Holder("image/1", "", TERMS), lambda: 1000.0)
    await _work(run)
    for step in PLAN[before:]:
        await send(acceptor, step)
    run._store = run._applier._store = run._objects._store = run._operations._store = store
    return run


@pytest.mark.parametrize("before", WAITING)
def test_of_two_copies_of_a_holder_one_goes_on_and_the_other_is_fenced(store: Meeting, before: int) -> None:
    """The image holds a claim, and the clock of both stands still: all that they write is equal, to the last byte."""
    run = asyncio.run(image(store, before))
    assert _statuses(*(_in_a_copy(lambda: asyncio.run(_work(run))) for _ in range(2))) == [0, 3]
    asyncio.run(_expect_undisturbed(store))


@pytest.mark.parametrize("before", WAITING)
def test_no_two_copies_that_claim_at_the_same_moment_hold_one_epoch(
    store: Meeting, tmp_path: Path, before: int
) -> None:
    """The image was quiesced. Both copies have the same name, and make the same claim of the next epoch."""
    asyncio.run(image(store, before))

    async def claim() -> None:
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("image/2", "", TERMS), lambda: 1000.0)
        (tmp_path / f"holds-{os.getpid()}").write_text(str(run.epoch))
        await _work(run)

    ended = _statuses(*(_in_a_copy(lambda: asyncio.run(claim())) for _ in range(2)))
    assert ended in ([0, 3], [0, 0]), "the second may come so late that it takes over from the first"
    epochs = [path.read_text() for path in tmp_path.glob("holds-*")]
    assert len(epochs) == len(set(epochs)), "each believes to hold an epoch of its own"
    asyncio.run(_expect_undisturbed(store))


async def _expect_undisturbed(store: Meeting) -> None:
    """Every operation is answered once, in order, with the answers and the state of a run that nobody copied."""
    calm = DirectoryStore(store._root.parent / "calm")
    acceptor = Acceptor(calm, lambda: 0.0)
    await acceptor.create(CREATION, b"create")
    for step in PLAN:
        await send(acceptor, step)
    reference = await Run.claim(calm, RUN, LedgerMachine(), Holder("calm/1", "", TERMS), lambda: 1000.0)
    await _work(reference)
    assert await _answers(store) == await _answers(calm)
    again = await Run.claim(
        DirectoryStore(store._root), RUN, LedgerMachine(), Holder("later/1", "", TERMS), lambda: 2000.0
    )
    assert again._state is not None
    assert reference._state is not None
    assert again._state.bytes() == reference._state.bytes()


async def _answers(store: DirectoryStore) -> list[tuple[int, bytes]]:
    answers: list[tuple[int, bytes]] = []
    for name in await store.list(layout.commits(RUN)):
        commit = decode(await store.get(name) or b"", Commit, name)
        answers += [(result.seq, result.body) for result in commit.results]
    assert [seq for seq, _ in answers] == list(range(STEPS + 1)), "each operation once, in order"
    return answers
