"""Histories on a disk that loses what was not synced, while processes die in the middle of store calls."""

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from knapper.errors import Corrupt, NotFound, StoreError
from knapper.state import layout
from knapper.state.journal.holder import Holder
from knapper.state.journal.results import Results
from knapper.state.journal.run import Run
from knapper.store import Names
from knapper.store.directory import DirectoryStore
from tests.sim.disk import Disk
from tests.sim.history import RUN, TERMS, History, make_plan, undisturbed
from tests.sim.ledger import LedgerMachine
from tests.sim.world import Killed

T = TypeVar("T")
_CUT_RATE, _KILL_RATE = 0.03, 0.15  # of each sync; and of each store call, a tenth of the first
_CUT_SOON_RATE, _SOON = 0.08, 30  # of store calls after a process died in one, when half-done work is in danger


class Local:
    """The store of a directory for a world that has no event loop. `opened` anew when the machine starts again."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.opened: DirectoryStore
        self.before_call: Callable[[], None] = lambda: None

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        return self._done(self.opened.put_if_absent(name, data))

    async def get(self, name: str) -> bytes | None:
        return self._done(self.opened.get(name))

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        return self._done(self.opened.list(prefix, start_after, limit))

    async def delete(self, name: str) -> None:
        self._done(self.opened.delete(name))

    def _done(self, verb: Coroutine[Any, Any, T]) -> T:
        try:
            self.before_call()
        except BaseException:
            verb.close()
            raise
        return asyncio.run_coroutine_threadsafe(verb, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


@dataclass
class OnDisk:
    """A history and the disk that it happens on. `syncs` decides what becomes of each sync."""

    seed: int
    disk: Disk
    local: Local
    faults: int = 60
    killed: int = 0  # in the middle of a store call
    _soon: int = 0
    history: History = field(init=False)

    def __post_init__(self) -> None:
        self._draw = random.Random(f"power {self.seed}")
        self.local.opened = DirectoryStore(self.disk.root)
        plan = make_plan(self.seed, length=8 + self.seed % 12)
        self.truth = undisturbed(plan, LedgerMachine())
        self.history = History(
            self.seed,
            plan,
            LedgerMachine(),
            claimants=1 + self.seed % 3,
            faults=self.faults,
            memory=self.local,
            back_off=40,
            observed=False,
        )
        self.history.world.kill_rate = self.history.world.error_rate = 0.005  # most die inside of store calls
        self.disk.before_sync = self._before_sync
        self.local.before_call = self._before_call

    def play(self) -> None:
        self.history.carry_out()
        self.disk.before_sync = self.local.before_call = lambda: None
        self._lose_power()  # once more, when all is done
        self.history.judge(self.truth)

    def _before_call(self) -> None:
        self._soon -= 1
        self._die(_CUT_SOON_RATE if self._soon > 0 else _CUT_RATE / 10, 0.0)

    def _before_sync(self) -> None:
        self._die(_CUT_RATE, _KILL_RATE)

    def _die(self, cut_rate: float, kill_rate: float) -> None:
        world, chance = self.history.world, self._draw.random()
        if world.turn is None or world.faults <= 0 or chance >= cut_rate + kill_rate:
            return  # the world's judges read, too: they do not die
        world.faults -= 1
        if chance < cut_rate:
            world.power_cut()
            self._lose_power()
        else:
            self.killed += 1
            self._soon = _SOON
        if not world.turn.mortal:
            raise StoreError("the machine went away")
        raise Killed

    def _lose_power(self) -> None:
        waiting = self.disk.before_sync, self.local.before_call
        self.disk.before_sync = self.local.before_call = lambda: None
        self.disk.cut()
        self.local.opened = DirectoryStore(self.disk.root)
        self.disk.before_sync, self.local.before_call = waiting
        asyncio.run(self._expect_promises(DirectoryStore(self.disk.root)))

    async def _expect_promises(self, store: DirectoryStore) -> None:
        """What was acknowledged is there, and what was seen is answered, as it was."""
        where, results = f"seed {self.seed}, cut {self.disk.cuts}", Results(store)
        for seq in sorted(self.history.acked):
            there = await store.get(layout.operation(RUN, seq)) is not None
            assert there or await results.find(RUN, seq) is not None, f"{where}: operation {seq} was acknowledged"
        for seq in sorted(self.history.seen | self.history.published):
            result = await results.find(RUN, seq)
            assert result is not None, f"{where}: the answer of operation {seq} was seen"
        try:
            await Run.claim(store, RUN, LedgerMachine(), Holder(f"cut {self.disk.cuts}", "", TERMS), lambda: 0.0)
        except NotFound:
            assert 0 not in self.history.acked, where
        except Corrupt as error:
            raise AssertionError(f"{where}: nobody can go on: {error}") from error


@dataclass
class Tally:
    histories: int = 0
    cuts: int = 0
    killed: int = 0
    syncs: int = 0
    dropped: int = 0
    torn: int = 0


def played(seed: int, tally: Tally) -> None:
    """Play and judge the history of one seed."""
    with TemporaryDirectory() as scratch, Disk(Path(scratch).resolve(), random.Random(f"disk {seed}")) as disk:
        local = Local()
        try:
            one = OnDisk(seed, disk, local)
            one.play()
        finally:
            local.close()
    tally.histories += 1
    tally.cuts, tally.killed = tally.cuts + disk.cuts, tally.killed + one.killed
    tally.syncs, tally.dropped, tally.torn = (
        tally.syncs + disk.syncs,
        tally.dropped + disk.dropped,
        tally.torn + disk.torn,
    )
