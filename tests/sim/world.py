"""A deterministic world.

One seed, one history. Processes are coroutines, one or several that live and die together. Each can be paused, fail, or
die at two points of every store call: before its effect and after it.
"""

import random
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any, Generic, Self, TypeVar

from knapper.errors import StoreError
from knapper.store import Names, Store
from knapper.store.memory import MemoryStore

T = TypeVar("T")


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


class Thread(Generic[T]):
    """One coroutine of a process, and what came of it."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self.work = work
        self.at: _Point | Thread[Any] | None = None  # the point at which it is paused, or the thread that it waits for
        self.done = False
        self._result: T
        self._error: Exception | None = None

    def __await__(self) -> "Generator[Thread[Any], None, T]":
        while not self.done:
            yield self
        if self._error is not None:
            raise self._error
        return self._result

    @property
    def ready(self) -> bool:
        return not isinstance(self.at, Thread) or self.at.done

    def go_on(self) -> None:
        """Until its next point. What it raises in the end is raised where it is awaited."""
        try:
            self.at = self.work.send(None)
        except StopIteration as stop:
            self._result, self.done = stop.value, True
        except Exception as error:  # noqa: BLE001
            self._error, self.done = error, True
        except Killed:  # inside a store call
            self.done = True
            raise

    def kill(self) -> None:
        if not self.done:
            try:
                self.work.throw(Killed())
            except (Killed, StopIteration):
                pass
            self.work.close()


class Threads:
    """The coroutines of one process, the first of which is its story; a seeded die says which goes on."""

    def __init__(self, story: Coroutine[Any, Any, None], draw: random.Random) -> None:
        self._draw = draw
        self._story = Thread(story)
        self._alive: list[Thread[Any]] = [self._story]

    def spawn(self, work: Coroutine[Any, Any, T], /) -> Thread[T]:
        thread = Thread(work)
        self._alive.append(thread)
        return thread

    def next(self) -> Thread[Any]:
        """The one that goes on."""
        ready = [thread for thread in self._alive if thread.ready]
        return ready[0] if len(ready) == 1 else self._draw.choice(ready)

    def go_on(self, thread: Thread[Any]) -> bool:
        """Until its next point. False once the story has ended, and all else with it."""
        thread.go_on()
        if thread.done:
            self._alive.remove(thread)
        if not self._story.done:
            return True
        self.kill()  # what it left behind is of no use to anyone
        if self._story._error is not None:
            raise self._story._error
        return False

    def kill(self) -> None:
        for thread in self._alive:
            thread.kill()
        self._alive.clear()

    @property
    def paused(self) -> "list[_Point]":
        """The points at which some are paused."""
        return [thread.at for thread in self._alive if isinstance(thread.at, _Point)]


@dataclass
class Process:
    name: str
    start: Callable[[], Coroutine[Any, Any, None]]  # a fresh memory each time
    mortal: bool = True
    threads: Threads | None = None
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
    died: Callable[[Process], None] = lambda _process: None  # called as a process is killed

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever still runs is over."""
        for process in self.processes:
            if process.threads is not None:
                process.threads.kill()

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

    def spawn(self, work: Coroutine[Any, Any, T], /) -> Thread[T]:
        """Beside the story of the process whose turn it is."""
        assert self.turn is not None
        assert self.turn.threads is not None
        return self.turn.threads.spawn(work)

    def _turn(self, process: Process) -> None:
        if process.threads is None:
            process.threads = Threads(process.start(), self.draw)
            process.lives += 1
        thread = process.threads.next()
        if isinstance(thread.at, _Point) and self.faults > 0:
            chance = self.draw.random()
            if process.mortal and chance < self.kill_rate:
                self._kill(process)
                return
            if thread.at.at_store and chance < self.kill_rate + self.error_rate:
                self.faults -= 1
                self.errors += 1
                thread.at.fault = StoreError("the store did not answer")
            elif (
                chance < self.kill_rate + self.error_rate + self.sleep_rate
            ):  # a zombie: it goes on much later, unaware
                process.asleep_until = self.steps + self.draw.randrange(400)
                return
        self.turn = process
        try:
            if not process.threads.go_on(thread):
                process.threads = None
                process.asleep_until = self.steps + self.draw.randrange(20)
        except Killed:  # inside a store call
            self._bury(process)
        finally:
            self.turn = None

    def power_cut(self) -> None:
        """Whatever runs on the machine is gone. Who does not die of it was far away, and its call fails."""
        for process in self.processes:
            if process is self.turn or process.threads is None:
                continue
            if process.mortal:
                self._kill(process)
            else:
                for point in process.threads.paused:
                    point.fault = StoreError("the machine went away") if point.at_store else None

    def _kill(self, process: Process) -> None:
        self.faults -= 1
        self.kills += 1
        self._bury(process)

    def _bury(self, process: Process) -> None:
        assert process.threads is not None
        self.died(process)
        process.threads.kill()
        process.threads = None
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
