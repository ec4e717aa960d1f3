"""The device: turns, one thread, errors to whom they belong, and an end."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

import pytest

from knapper.engine.device import Device, Task


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device("test")
    yield device
    device.close()


def steps(seen: list[str], name: str, count: int, begin: threading.Event | None = None) -> Task[str]:
    if begin is not None:
        begin.wait(10)
    for n in range(count):
        seen.append(f"{name}{n}")
        yield
    return name


def test_tasks_take_turns_step_by_step(device: Device) -> None:
    seen: list[str] = []
    begin = threading.Event()
    first = device.submit(steps(seen, "a", 3, begin))  # holds the thread until the others have arrived
    others = [device.submit(steps(seen, name, 3)) for name in "bc"]
    begin.set()
    assert [future.result(10) for future in (first, *others)] == ["a", "b", "c"]
    assert seen == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]


def test_a_failure_reaches_its_caller_and_nobody_else(device: Device) -> None:
    def broken() -> Task[None]:
        yield
        raise ZeroDivisionError("mine")

    seen: list[str] = []
    failed, fine = device.submit(broken()), device.submit(steps(seen, "x", 4))
    with pytest.raises(ZeroDivisionError, match="mine"):
        failed.result(10)
    assert fine.result(10) == "x"


def test_a_cancelled_caller_ends_its_task_at_the_next_step(device: Device) -> None:
    closed = threading.Event()

    def endless() -> Task[None]:
        try:
            while True:
                yield
        finally:
            closed.set()

    async def story() -> None:
        waiting = asyncio.ensure_future(device.run(endless()))
        await asyncio.sleep(0.02)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(story())
    assert closed.wait(10)


def test_closing_cancels_what_is_not_finished() -> None:
    device = Device("closing")
    begun = threading.Event()

    def endless() -> Task[None]:
        while True:
            begun.set()
            yield

    future: Future[None] = device.submit(endless())
    assert begun.wait(10)
    device.close()
    with pytest.raises(CancelledError):
        future.result(10)
