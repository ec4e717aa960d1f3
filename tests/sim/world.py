"""A deterministic world.

One seed, one history. Processes are coroutines. Each can be paused, fail, or die at two points of every store call:
before its effect and after it.
"""

import random
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any

from knapper.errors import StoreError
from knapper.store import Names, Store
from knapper.store.memory import MemoryStore


class Killed(BaseException):
    """kill -9: nothing catches it, and nothing that cleans up may reach the store."""


@dataclass
class _Point:
    """The point at which a process is paused. `fault`: what the world raises there when it goes on."""

    fault: BaseException | None = None
    at_store: bool = True  # a mere pause cannot fail; one may die in it all the same

    def __await__(self) -> Generator["_Point", None, None]:
        yield self
        if self.fault is not None:
            raise self.fault


@dataclass
class Process:
    name: str
    start: Callable[[], Coroutine[Any, Any, None]]  # a fresh memory each time
    mortal: bool = True
    story: Coroutine[Any, Any, None] | None = None
    at: _Point | None = None
    asleep_until: int = 0
    lives: int = 0


@dataclass
class World:
    """Runs processes in random turns until all `until` are done; injects faults while `faults` last."""

    seed: int
    faults: int = 30
    kill_rate: float = 0.06
    error_rate: float = 0.04
    sleep_rate: float = 0.03
    now: float = 1_000_000.0
    steps: int = 0
    kills: int = 0
    errors: int = 0
    processes: list[Process] = field(default_factory=list)
    turn: Process | None = None  # whose it is

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def clock(self) -> float:
        return self.now

    def add(self, name: str, start: Callable[[], Coroutine[Any, Any, None]], *, mortal: bool = True) -> Process:
        process = Process(name, start, mortal)
        self.processes.append(process)
        return process

    def run(self, until: Callable[[], bool], steps_max: int = 200_000) -> None:
        while not until():
            self.steps += 1
            assert self.steps < steps_max, f"seed {self.seed}: no end after {self.steps} steps"
            awake = [p for p in self.processes if p.asleep_until <= self.steps]
            if awake:
                self._turn(self.draw.choice(awake))
            self.now += self.draw.choice((0.0, 0.0, 0.001, 0.02))

    def _turn(self, process: Process) -> None:
        if process.story is None:
            process.story = process.start()
            process.lives += 1
            process.at = None
        if process.at is not None and self.faults > 0:
            chance = self.draw.random()
            if process.mortal and chance < self.kill_rate:
                self._kill(process)
                return
            if process.at.at_store and chance < self.kill_rate + self.error_rate:
                self.faults -= 1
                self.errors += 1
                process.at.fault = StoreError("the store did not answer")
            elif (
                chance < self.kill_rate + self.error_rate + self.sleep_rate
            ):  # a zombie: it goes on much later, unaware
                process.asleep_until = self.steps + self.draw.randrange(400)
                return
        self.turn = process
        try:
            process.at = process.story.send(None)
        except StopIteration:
            process.story = None
            process.asleep_until = self.steps + self.draw.randrange(20)
        except Killed:  # inside a store call
            process.story, process.at = None, None
            process.asleep_until = self.steps + self.draw.randrange(60)
        finally:
            self.turn = None

    def power_cut(self) -> None:
        """Whatever runs on the machine is gone. Who does not die of it was far away, and its call fails."""
        for process in self.processes:
            if process is self.turn or process.story is None:
                continue
            if process.mortal:
                self._kill(process)
            elif process.at is not None and process.at.at_store:
                process.at.fault = StoreError("the machine went away")

    def _kill(self, process: Process) -> None:
        self.faults -= 1
        self.kills += 1
        assert process.story is not None
        try:
            process.story.throw(Killed())
        except Killed:
            pass
        process.story, process.at = None, None
        process.asleep_until = self.steps + self.draw.randrange(60)


@dataclass
class WorldStore:
    """The memory store, seen from inside the world."""

    world: World
    created: Callable[[str, bytes], None]  # called with every object as it is created
    deleted: Callable[[str], None] = lambda _name: None  # and of every one at the moment before it is gone
    memory: Store = field(default_factory=MemoryStore)  # where it all lies, seen from outside

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        await _Point()
        won = await self.memory.put_if_absent(name, data)
        if won:
            self.created(name, data)
        await _Point()
        return won

    async def get(self, name: str) -> bytes | None:
        await _Point()
        data = await self.memory.get(name)
        await _Point()
        return data

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        await _Point()
        listed = await self.memory.list(prefix, start_after, limit)
        await _Point()
        return listed

    async def delete(self, name: str) -> None:
        await _Point()
        self.deleted(name)
        await self.memory.delete(name)
        await _Point()


async def pause() -> None:
    """Let others go on."""
    await _Point(at_store=False)
