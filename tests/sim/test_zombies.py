"""Hundreds of processes that sleep through takeovers and collections, and go on where they stood: nothing of it counts.

Replay one:  python -m tests.sim.test_zombies TRIAL
"""

import asyncio
import random
import sys
from collections.abc import Coroutine
from functools import cache
from typing import Any, TypeVar

import pytest

from knapper.errors import Corrupt, KnapperError
from knapper.state import layout
from knapper.state.gc.collector import Collector
from knapper.state.gc.lookups import Retention
from knapper.state.journal.accept import Acceptor, newest_manifest
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, decode
from knapper.state.journal.results import GONE, Results
from knapper.state.journal.run import Run
from tests.sim.history import CREATION, RUN, SESSION, TERMS, Step, Truth, digest_of, make_plan, send, undisturbed
from tests.sim.ledger import LedgerMachine
from tests.sim.world import Thread, Threads, World, WorldStore

TRIALS = 500
_PLANS = 40
T = TypeVar("T")
_KEEP = Retention(results_s=1.0, samplers_s=1.0, orphans_s=1.0, finished_s=1e9, records_s=1e9)


@cache
def truth_of(plan: int) -> tuple[list[Step], Truth]:
    steps = make_plan(plan, length=10 + plan % 8)
    return steps, undisturbed(steps, LedgerMachine())


class Trial:
    """One process sleeps at a random point; others take over, collect, finish; then it wakes."""

    def __init__(self, number: int, run_class: type[Run[Any]] = Run) -> None:
        self.number = number
        self.plan, self.truth = truth_of(number % _PLANS)
        self.draw = random.Random(number)
        self.store = WorldStore(World(number), self._created)
        self.acceptor = Acceptor(self.store, lambda: 0.0)
        self.fate = ""  # what ended the sleeper
        self.collected = 0
        self._run_class = run_class
        self._epoch = 0
        self.voids: list[str] = []  # slots of collected records that were taken again

    def play(self) -> None:
        """Raises AssertionError, which names the trial."""
        half = self.draw.randrange(1, len(self.plan))
        self._drive(self._send(CREATION, self.plan[:half]))
        before, zombie = (Threads(self._worker(name), self.draw) for name in ("before", "zombie"))
        try:
            self._play(half, before, zombie)
        finally:
            before.kill()
            zombie.kill()
        asyncio.run(self._judge())

    def _play(self, half: int, before: Threads, zombie: Threads) -> None:
        self._go_on(before, self.draw.choice((0, 100)))
        self.asleep = self._go_on(zombie, self.draw.randrange(self.draw.choice((40, 400))))
        self._drive(self._send(None, self.plan[half:]))
        self._go_on(before, self.draw.choice((0, 100, 300)))  # while the zombie sleeps in its claim, it goes on
        for pod in range(2):
            self._drive(self._successor(pod, last=pod == 1))
            if self.draw.random() < 0.5:
                self._drive(self._collect())
        assert self.asleep, f"trial {self.number}: it ended before it slept"
        self._go_on(zombie)

    def _drive(self, story: Coroutine[Any, Any, None]) -> None:
        """All of it."""
        self._go_on(Threads(story, self.draw))

    def _go_on(self, process: Threads, turns: int = 10**6) -> bool:
        """For so many turns, each from one store call to the next; False once it has ended."""
        self._turn = process
        return all(process.go_on(process.next()) for _ in range(turns))

    def _spawn(self, work: Coroutine[Any, Any, T], /) -> Thread[T]:
        return self._turn.spawn(work)

    async def _send(self, creation: Any, steps: list[Step]) -> None:
        if creation is not None:
            await self.acceptor.create(creation, b"create")
        for step in steps:
            await send(self.acceptor, step)

    async def _claim(self, name: str) -> Run[Any]:
        holder = Holder(name, "", TERMS)
        run = await self._run_class.claim(self.store, RUN, LedgerMachine(), holder, lambda: 0.0, spawn=self._spawn)
        assert not self.voids, (
            f"trial {self.number}: {name} took {self.voids}, of old, and thinks that it holds the run"
        )
        self._epoch = max(self._epoch, run.epoch)
        return run

    async def _worker(self, name: str) -> None:
        """Works on, an operation or a snapshot at a time, as if nothing had happened, until something tells it."""
        try:
            run = await self._claim(name)
            for _ in range(300):
                await self._some(run)
        except KnapperError as error:
            if name == "zombie":
                self.fate = error.code

    async def _successor(self, pod: int, *, last: bool) -> None:
        run = await self._claim(f"pod-{pod}")
        for _ in range(10**6 if last else self.draw.randrange(12)):
            more = await self._some(run)
            if last and not more and run.applied == len(self.plan):
                return

    async def _some(self, run: Run[Any]) -> bool:
        turns = iter(range(self.draw.randrange(1, 4)))
        more = await run.apply_pending(lambda: next(turns, None) is None, _nothing)
        if run.wants_snapshot or self.draw.random() < 0.2:
            await run.snapshot()
        return more

    async def _collect(self) -> None:
        """All that may ever go, as after long."""
        now = iter(range(0, 10**6, 10))
        collector = Collector(self.store, _KEEP, lambda: 1e6, lambda: float(next(now)))
        for _ in range(3):
            self.collected += (await collector.visit(SESSION, RUN)).deleted

    def _created(self, name: str, data: bytes) -> None:
        if name.startswith(layout.commits(RUN)):
            newest = asyncio.run(newest_manifest(self.store.memory, RUN))
            if newest is not None and layout.last_number(name) <= newest[1].snapshot_before_out:
                self.voids.append(name)
            commit = decode(data, Commit, name)
            assert not commit.results or commit.epoch >= self._epoch, f"trial {self.number}: the zombie wrote {name}"

    async def _judge(self) -> None:
        where, memory = f"trial {self.number}", self.store.memory
        run = await Run.claim(memory, RUN, LedgerMachine(), Holder("judge", "", TERMS), lambda: 0.0)
        assert run.applied == len(self.plan), where
        assert await digest_of(LedgerMachine(), run) == self.truth.digest, where
        results = Results(memory)
        for seq, body in self.truth.answers.items():
            result = await results.find(RUN, seq)
            assert result is not None, f"{where}: operation {seq} has no answer"
            assert result.body == body or result.body == GONE, f"{where}: operation {seq}: {result.body!r}"


async def _nothing(_n: int, _commit: Commit) -> None:
    return None


@pytest.mark.parametrize("count", [TRIALS, pytest.param(1000, marks=pytest.mark.long)])
def test_zombies_write_nothing_that_counts(count: int) -> None:
    trials = [Trial(number) for number in range(count)]
    for trial in trials:
        trial.play()
    fates = [trial.fate for trial in trials]
    woken = {fate: fates.count(fate) for fate in sorted(set(fates))}
    collected = sum(trial.collected for trial in trials)
    print(f"\n{count} zombies, ended by {woken}; {collected} objects collected between takeovers")
    assert fates.count("fenced") > count / 4, woken
    assert sum(trial.collected > 0 for trial in trials) > count / 4


class WithoutFence(Run[Any]):
    async def _fence(self) -> None:
        return None


class Unaware(Run[Any]):
    """Goes on from what it has read, even if another process has claimed or collected meanwhile."""

    async def _expect_newest(self, error: Corrupt | None = None) -> None:
        return None


@pytest.mark.parametrize("broken", [WithoutFence, Unaware])
def test_the_trials_turn_red_without_a_guard(broken: type[Run[Any]]) -> None:
    with pytest.raises(AssertionError, match="trial"):
        for number in range(TRIALS):
            Trial(number, broken).play()


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        trial = Trial(int(argument))
        trial.play()
        print(
            f"trial {argument}: fine; the zombie ended by {trial.fate or 'itself'}, {trial.collected} objects collected"
        )
