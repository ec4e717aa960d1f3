"""Periodic tasks continue after any failure, and end silently with the gateway."""

import asyncio
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import pytest
import structlog

from gateway import periodic, periodic_tasks
from gateway.periodic import PeriodicTask, running
from knapper.errors import StoreError
from knapper.store.memory import MemoryStore
from tests.gateway.running import fwdbwd, gateway

Lines = list[MutableMapping[str, Any]]


@contextmanager
def logged() -> Iterator[Lines]:
    with structlog.testing.capture_logs(processors=[structlog.processors.format_exc_info]) as lines:
        yield lines


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


class Sore(MemoryStore):
    """Does to a periodic task what the test says, once for each thing it says; everybody else sees a store."""

    def __init__(self, name: str, *ills: BaseException) -> None:
        super().__init__()
        self._name = name
        self.ills = list(ills)

    async def get(self, name: str) -> bytes | None:
        task = asyncio.current_task()
        if self.ills and task is not None and task.get_name() == self._name:
            raise self.ills.pop(0)
        return await super().get(name)


def test_a_tick_with_a_defect_is_logged_with_its_traceback_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(periodic_tasks, "_TICK_S", 0.02)
    monkeypatch.setattr(periodic, "_FAILED_S", 0.02)
    store = Sore("tick", RuntimeError("a defect"), asyncio.CancelledError("a stranger's"), StoreError("away"))
    with logged() as lines, gateway(store) as running:
        session = running.session()
        run = running.make_run(session)
        running.forward_backward(fwdbwd(run, 2))
        running.post(f"sessions/{session}/finish", {"reason": {"type": "interrupted"}})
        until(lambda: running.stored(run, 1) is not None)  # a tick filled the gap
    assert store.ills == []
    ticks = [line for line in lines if line["event"].startswith("tick")]
    assert [line["event"] for line in ticks] == ["tick: defect", "tick: defect", "tick failed"]
    assert "RuntimeError: a defect" in ticks[0]["exception"]
    assert "revive" in ticks[0]["exception"], "the traceback says where"
    assert "a stranger's" in ticks[1]["exception"]
    assert (ticks[2]["code"], ticks[2]["reason"]) == ("store_unavailable", "away")


def test_a_gateway_that_stops_in_the_middle_of_its_tasks_logs_no_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def stuck(name: str) -> Callable[[object], Any]:
        async def work(_: object) -> None:
            begun.append(name)
            await asyncio.sleep(3600)

        return work

    for name in ("tick", "jobs", "settle_accounts"):
        monkeypatch.setattr(periodic_tasks, name, stuck(name))
    for pace in ("_TICK_S", "_JOBS_S", "_SAMPLE_USAGE_S", "_ACCOUNTS_S"):
        monkeypatch.setattr(periodic_tasks, pace, 0.01)
    with logged() as lines:
        with gateway():
            until(lambda: len(set(begun)) == 3)
        assert [line for line in lines if line["log_level"] != "info"] == []


def test_what_fails_is_not_tried_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(periodic, "_FAILED_S", 30.0)
    tries: list[str] = []

    async def fail() -> None:
        tries.append("failed")
        raise StoreError("away")

    async def story() -> None:
        often = asyncio.Event()

        async def work() -> None:
            tries.append("worked")
            if tries.count("worked") == 20:
                often.set()

        async with periodic.running([PeriodicTask("a", fail, 0.0), PeriodicTask("b", work, 0.0)]):
            await often.wait()

    asyncio.run(story())
    assert tries.count("failed") == 1


def test_a_ring_at_the_end_does_not_keep_a_task_alive() -> None:
    """In the very moment in which it is cancelled: Python 3.11's wait_for forgets the cancellation then."""

    async def story() -> None:
        worked = asyncio.Event()

        async def work() -> float:
            worked.set()
            return 100.0

        task = PeriodicTask("rung", work, 0.01)
        async with asyncio.timeout(5), running([task]):
            await worked.wait()
            await asyncio.sleep(0.4)  # in its pause of 0.64 s, before which it waited 0.3
            task.doorbell.set()

    asyncio.run(story())
