"""Followed pages: read once for all viewers, and a page in a forgotten tab soon costs nothing."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.console.live import Watches
from knapper import limits
from knapper.errors import NotFound, TooMany
from knapper.store.memory import MemoryStore
from tests.gateway.finished import lay_jobs, lay_runs
from tests.gateway.hours import CountingStore, clock, gateway, lived

HOURS = 3600.0


async def _read(events: AsyncIterator[bytes], until: bytes) -> list[bytes]:
    got = []
    async for event in events:
        if not event.startswith(b":"):
            got.append(event)
        if until in event:
            break
    return got


def test_a_forgotten_tab_costs_a_few_calls_and_then_none() -> None:
    """A page of a run, and one of a job, are left open in a browser that never goes away."""

    async def story() -> list[tuple[int, int, float]]:
        store = CountingStore(MemoryStore())
        (run,) = await lay_runs(store, clock, 1)
        await lay_jobs(store, clock, 1)
        loop, told = asyncio.get_running_loop(), []
        async with gateway(store) as running:
            await asyncio.sleep(30 * HOURS)  # the gateway is idle, and everything is accounted for
            idle = await _calls(store, 2 * HOURS)
            for page in (f"runs/{run}", "jobs/job-0"):
                await running.http.get(f"http://127.0.0.1/{page}/curve")
                store.calls.clear()
                began = loop.time()
                headers = {"Accept": "text/event-stream"}
                answer = await running.http.get(f"http://127.0.0.1/{page}/live", headers=headers)
                assert answer.text.endswith("event: end\ndata: {}\n\n")
                assert "event: news" not in answer.text
                told.append((sum(store.calls.values()), await _calls(store, 2 * HOURS) - idle, loop.time() - began))
            assert running.parts.console.watches.viewers == 0
        return told

    of_run, of_job = lived(story)
    looks = 15  # after 1, 3, 7, 15 and 31 s, and then every 30 s until five minutes are over
    for (while_open, after, took_s), calls_a_look in ((of_run, 1), (of_job, 4)):
        assert while_open <= looks * calls_a_look + 10, "the ten find the run or job, and what the gateway does anyway"
        assert after == 0
        assert took_s - 2 * HOURS <= limits.console_watch_s + 60


async def _calls(store: CountingStore, seconds: float) -> int:
    store.calls.clear()
    await asyncio.sleep(seconds)
    return sum(store.calls.values())


def test_one_look_serves_everyone() -> None:
    async def story() -> tuple[list[list[bytes]], int]:
        looked = 0

        async def look() -> object:
            nonlocal looked
            looked += 1
            return {"n": looked} if looked <= 3 else None

        watches = Watches(asyncio.get_running_loop().time)
        viewers = [await watches.follow("a", look) for _ in range(20)]
        got = await asyncio.gather(*(_read(events, b"event: end") for events in viewers))
        return list(got), looked

    got, looked = lived(story)
    assert looked < 3 + 20
    expected = [b'event: news\ndata: {"n":%d}\n\n' % n for n in (1, 2, 3)] + [b"event: end\ndata: {}\n\n"]
    assert all(each == expected for each in got)


def test_what_changes_is_followed_as_long_as_it_does() -> None:
    async def story() -> int:
        loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()

        async def look() -> object:
            return {} if loop.time() - began < 3 * HOURS else None

        events = await Watches(loop.time).follow("a", look)
        got = await _read(events, b"event: end")
        assert loop.time() - began == pytest.approx(3 * HOURS + limits.console_watch_s, abs=60.0)
        return len(got)

    assert lived(story) > 3 * HOURS - 10


def test_who_leaves_ends_the_looks_and_who_is_last_turns_off_the_light() -> None:
    async def story() -> None:
        looked = 0

        async def look() -> object:
            nonlocal looked
            looked += 1
            return {"n": looked}

        watches = Watches(asyncio.get_running_loop().time)
        first, second = await watches.follow("a", look), await watches.follow("a", look)
        await _read(first, b'"n":2')
        await first.aclose()  # type: ignore[attr-defined]
        assert watches.viewers == 1
        await _read(second, b'"n":4')
        await second.aclose()  # type: ignore[attr-defined]
        before = looked
        await asyncio.sleep(HOURS)
        assert (watches.viewers, looked) == (0, before)

    lived(story)


def test_streams_are_counted_and_end_with_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        monkeypatch.setattr(limits, "console_streams_max", 2)

        async def gone() -> object:
            raise NotFound("the run was deleted")

        watches = Watches(asyncio.get_running_loop().time)
        open_streams = [await watches.follow(key, gone) for key in ("a", "b")]
        with pytest.raises(TooMany):
            await watches.follow("c", gone)
        for events in open_streams:
            assert await _read(events, b"event: end") == [b"event: end\ndata: {}\n\n"]
        (last,) = [await watches.follow("c", gone)]
        await watches.close()
        assert await _read(last, b"event: end") == [b"event: end\ndata: {}\n\n"]

    lived(story)
