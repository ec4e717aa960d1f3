"""Runs that are deleted in the middle of their histories: processes that slept bring nothing back, nor does a crash.

Replay one:  python -m tests.sim.test_deletions SEED
"""

import asyncio
import sys

import pytest

from knapper.errors import KnapperError, NotFound
from knapper.state import layout
from knapper.state.gc.collector import Collector
from knapper.state.journal import ends
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, decode
from knapper.state.journal.run import Run
from knapper.state.layout import run_prefix
from tests.sim.history import CREATION, RUN, SESSION, SPEC, TERMS, History, make_plan, send
from tests.sim.ledger import LedgerMachine
from tests.sim.world import pause
from tests.store.faulty import Rates


class Deletion(History):
    """The client goes on until it learns that the run is gone; its owner deletes it on the way."""

    def __init__(self, seed: int) -> None:
        plan, machine = make_plan(seed, length=12 + seed % 25), LedgerMachine()
        rates = Rates.everywhere(0.003)
        super().__init__(seed, plan, machine, claimants=1 + seed % 3, faults=50, rates=rates)
        self.done = False

    def carry_out(self) -> None:
        world = self.world
        world.add("client", self._client, mortal=False)
        world.add("owner", self._owner)
        for n in range(self.claimants):
            world.add(f"holder{n}", self._holder)
        for n in range(2):
            world.add(f"collector{n}", self._collector)
        with world:
            world.run(lambda: self.done)
            before = world.steps
            world.run(lambda: world.steps > before + 4000)  # sleeping processes wake up and go on

    async def _client(self) -> None:
        await self._until_acked(lambda a: a.create(CREATION, b"create"), 0)
        for step in self.plan:
            if await self._is_over():
                break
            await self._until_acked(lambda a, s=step: send(a, s), step.seq)  # type: ignore[misc]
        while True:
            await pause()

    async def _is_over(self) -> bool:
        """As a gateway finds it out, which stored nothing for the run after that."""
        while True:
            try:
                return await ends.ended(self.store, RUN) is not None
            except KnapperError:
                continue

    async def _owner(self) -> None:
        """Dies over it, and comes again."""
        for _ in range(self.world.draw.randrange(400)):
            await pause()
        if 0 not in self.acked:
            return
        try:
            await Collector(self.store, self.keep, self.world.clock, self.world.clock).delete(RUN, SPEC.tenant)
        except KnapperError:
            return
        self.done = True

    def _deleted(self, name: str) -> None:
        self.deletions += 1
        end = asyncio.run(ends.ended(self.sound.memory, RUN))
        if end is None:
            super()._deleted(name)
            return
        assert not name.startswith(layout.ends(RUN)), f"seed {self.seed}: the end itself is deleted"
        if name.startswith(layout.commits(RUN)):
            commit = decode(asyncio.run(self.sound.memory.get(name)) or b"", Commit, name)
            assert commit.results, f"seed {self.seed}: {name} is deleted, and is a fence"

    def _created(self, name: str, data: bytes) -> None:
        super()._created(name, data)
        if name.startswith(layout.commits(RUN)) and self.done:
            results = decode(data, Commit, name).results
            assert not results, f"seed {self.seed}: {name} was committed to a run that is gone"

    def judge_end(self) -> int:
        """Nothing can go on, and nothing is left but what says so. Return how many bytes."""

        async def story() -> int:
            memory, where = self.sound.memory, f"seed {self.seed}"
            now = [self.world.now]
            collector = Collector(memory, self.keep, lambda: now[0], lambda: now[0])
            for _ in range(3):  # as the chore does it, whatever came late
                now[0] += 100.0
                await collector.visit(SESSION, RUN)
            with pytest.raises(NotFound):
                await Run.claim(memory, RUN, self.machine, Holder("late", "", TERMS), lambda: 0.0)
            with pytest.raises(NotFound):
                await Acceptor(memory, lambda: 0.0).create(CREATION, b"create")
            for prefix in ("adapters/", "checkpoints/", "samplers/", "inflight/"):
                assert await memory.list(prefix) == [], where
            left = await memory.list(run_prefix(RUN))
            kinds = {name.removeprefix(run_prefix(RUN)).partition("/")[0] for name in left}
            assert kinds <= {"end", "out", "manifest"}, f"{where}: {kinds}"
            return sum([len(await memory.get(name) or b"") for name in left])

        return asyncio.run(story())


def play(seed: int) -> tuple[Deletion, int]:
    history = Deletion(seed)
    history.carry_out()
    return history, history.judge_end()


@pytest.mark.parametrize("seeds", [80, pytest.param(250, marks=pytest.mark.long)])
def test_nothing_of_a_deleted_run_comes_back_whoever_slept_or_died(seeds: int) -> None:
    played = [play(seed) for seed in range(seeds)]
    kills, left = sum(history.world.kills for history, _ in played), [size for _, size in played]
    print(f"\n{seeds} runs deleted among {kills} kills; at most {max(left)} bytes are left of one")
    assert kills > seeds
    assert max(left) < 4000, "what is left says that it is gone, and keeps out who slept"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        history, left = play(int(argument))
        print(f"seed {argument}: fine after {history.world.kills} kills; {left} bytes are left")
