"""The device: turns, one thread, errors to whom they belong, and an end."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

import pytest

from knapper.engine.executor import Executor, Work


@pytest.fixture
def device() -> Iterator[Executor]:
    device = Executor("test")
    yield device
    device.close()


def steps(seen: list[str], name: str, count: int, begin: threading.Event | None = None) -> Work[str]:
    if begin is not None:
        begin.wait(10)
    for n in range(count):
        seen.append(f"{name}{n}")
        yield
    return name


def test_tasks_take_turns_step_by_step(device: Executor) -> None:
    seen: list[str] = []
    begin = threading.Event()
    first = device.submit(steps(seen, "a", 3, begin))  # holds the thread until the others have arrived
    others = [device.submit(steps(seen, name, 3)) for name in "bc"]
    begin.set()
    assert [future.result(10) for future in (first, *others)] == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def test_a_failure_reaches_its_caller_and_nobody_else(device: Executor) -> None:
    def broken() -> Work[None]:
        yield
        raise ZeroDivisionError("mine")

    seen: list[str] = []
    failed, fine = device.submit(broken()), device.submit(steps(seen, "x", 4))
    with pytest.raises(ZeroDivisionError, match="mine"):
        failed.result(10)
    assert fine.result(10) == "x"


def test_a_cancelled_caller_ends_its_task_at_the_next_step(device: Executor) -> None:
    begun, closed = threading.Event(), threading.Event()

    def endless() -> Work[None]:
        try:
            while True:
                begun.set()
                yield
        finally:
            closed.set()

    async def story() -> None:
        waiting = asyncio.ensure_future(device.run(endless()))
        assert await asyncio.to_thread(begun.wait, 10)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(story())
    assert closed.wait(10)


def test_closing_cancels_what_is_not_finished() -> None:
    device = Executor("closing")
    begun = threading.Event()

    def endless() -> Work[None]:
        while True:
            begun.set()
            yield

    future: Future[None] = device.submit(endless())
    assert begun.wait(10)
    device.close()
    with pytest.raises(CancelledError):
        future.result(10)


class Spent:
    """A clock that goes on while turns are taken, and else stands."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.turns: list[tuple[str, float]] = []  # whose, and when it began

    def __call__(self) -> float:
        return self.now_s

    def task(self, whose: str, takes_s: float, turns: int, begin: threading.Event | None = None) -> Work[None]:
        if begin is not None:
            begin.wait(10)
        for _ in range(turns):
            self.turns.append((whose, self.now_s))
            self.now_s += takes_s
            yield

    def had_s(self, whose: str, until_s: float) -> float:
        """Seconds that one had by then; what is not its own turn is the other's."""
        ends = [*[began for _, began in self.turns[1:]], self.now_s]
        return sum(
            min(end, until_s) - began
            for (name, began), end in zip(self.turns, ends, strict=True)
            if name == whose and began < until_s
        )


def test_owners_share_by_time_and_not_by_turns() -> None:
    spent = Spent()
    device, begin = Executor("shares", spent), threading.Event()
    try:
        first = device.submit(spent.task("long", 1.0, 10, begin), "long")
        tasks = [first, *(device.submit(spent.task("short", 0.25, 20), "short") for _ in range(2))]
        begin.set()
        for task in tasks:
            task.result(10)
    finally:
        device.close()
    for until_s in range(1, 20):
        assert abs(spent.had_s("long", until_s) - spent.had_s("short", until_s)) <= 1.0  # the longest turn
    assert device.busy_s == spent.now_s == 20.0


def test_who_was_away_begins_level_and_waits_for_one_turn() -> None:
    """Neither does it catch up with what the other had meanwhile, nor does the other wait for what it had before."""
    spent = Spent()
    device, begin = Executor("level", spent), threading.Event()
    try:
        early = device.submit(spent.task("came back", 1.0, 3, begin), "came back")
        begin.set()
        early.result(10)
        begin.clear()
        there = device.submit(spent.task("there", 1.0, 20, begin), "there")
        again: Future[Future[None]] = Future()

        def middle() -> Work[None]:
            for _ in range(5):
                yield
            again.set_result(device.submit(spent.task("came back", 1.0, 8), "came back"))

        device.submit(middle(), "there")
        begin.set()  # else it could finish before the other one arrives
        again.result(10).result(10)
        there.result(10)
    finally:
        device.close()
    names = [whose for whose, _ in spent.turns][3:]
    begins = names.index("came back")
    assert set(names[:begins]) == {"there"}
    assert begins > 1
    both = names[begins : begins + 16]
    assert both.count("came back") == 8
    assert "".join(name[0] for name in both) in ("ct" * 8, "tc" * 8)


def test_what_a_turn_began_is_waited_for_only_if_others_wait() -> None:
    synchronized: list[int] = []
    seen: list[str] = []
    device, begin = Executor("settles", synchronize=lambda: synchronized.append(len(seen))), threading.Event()
    try:
        device.submit(steps(seen, "a", 5)).result(10)
        assert synchronized == []
        first = device.submit(steps(seen, "b", 2, begin), "b")
        other = device.submit(steps(seen, "c", 2), "c")
        begin.set()
        first.result(10)
        other.result(10)
    finally:
        device.close()
    assert synchronized


def test_once_nothing_has_come_for_a_while_it_is_told_once_and_work_goes_on() -> None:
    seen: list[str] = []
    told = threading.Event()

    def idle() -> None:
        seen.append("idle")
        told.set()

    device = Executor("rests", idle=idle, idle_s=0.02)
    try:
        device.submit(steps(seen, "a", 2)).result(10)
        assert told.wait(10)
        told.clear()
        assert not told.wait(0.1)
        device.submit(steps(seen, "b", 1)).result(10)
        assert told.wait(10)
    finally:
        device.close()
    assert [what for what in seen if what == "idle"] == ["idle", "idle"]
    assert seen[0] != "idle"
