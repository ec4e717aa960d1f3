"""Pages of the newest names: all of them, each once, and few calls however many there are."""

import asyncio
from random import Random

import pytest

from knapper.ids import number
from knapper.state import recent
from knapper.state.recent import PageStart
from knapper.store.memory import MemoryStore
from tests.gateway.hours import CountingStore

NOW = 1_800_000_000_000_000
DAY_US = 86_400_000_000


def pages(times: list[int], size: int) -> tuple[list[str], int]:
    """All names by page after page, and the most calls that one page took."""
    store = CountingStore(MemoryStore())

    async def walk() -> tuple[list[str], int]:
        for n, at in enumerate(times):
            await store.put_if_absent(f"t/{number(at)}-{n}", b"")
        for other in ("s/1", f"u/{number(NOW)}-x"):
            await store.put_if_absent(other, b"")
        names, most = list[str](), 0
        start: PageStart | None = PageStart(NOW)
        while start is not None:
            store.calls.clear()
            page = await recent.page(store, "t/", size, start)
            most = max(most, store.verbs["list"])
            assert len(page.names) <= size
            names += page.names
            start = page.older
        return names, most

    return asyncio.run(walk())


@pytest.mark.parametrize("spread_us", [1, 1000, DAY_US, 3000 * DAY_US])
@pytest.mark.parametrize("count", [0, 1, 10, 400])
def test_pages_have_each_name_once_newest_first(spread_us: int, count: int) -> None:
    rng = Random(count)
    times = [NOW - 1 - rng.randrange(spread_us) for _ in range(count)]
    names, calls = pages(times, 10)
    assert names == sorted((f"t/{number(at)}-{n}" for n, at in enumerate(times)), reverse=True)
    assert calls <= 17


def test_a_page_of_many_costs_as_few_calls_as_one_of_few() -> None:
    """Evenly in time, as of a deployment that trains, and all within a minute, as of a search for a learning rate."""
    for spread_us in (DAY_US, 60_000_000):
        _, calls = pages([NOW - 1 - n * spread_us for n in range(2000)], 25)
        assert calls <= 5


def test_a_burst_beside_old_names() -> None:
    times = [NOW - 1 - n for n in range(300)] + [NOW - 400 * DAY_US - n * DAY_US for n in range(300)]
    names, calls = pages(times, 20)
    assert len(names) == len(set(names)) == 600
    assert calls <= 17


def test_a_short_page_of_a_busy_hour_takes_two_calls() -> None:
    """The six newest jobs of 60 within the hour, before which there were few: each call may read a long directory."""
    times = [NOW - 1 - n * 60_000_000 for n in range(60)] + [NOW - n * DAY_US for n in range(1, 300)]
    store = CountingStore(MemoryStore())

    async def first_page() -> recent.NamePage:
        for n, at in enumerate(times):
            await store.put_if_absent(f"t/{number(at)}-{n}", b"")
        store.calls.clear()
        return await recent.page(store, "t/", 6, PageStart(NOW))

    assert len(asyncio.run(first_page()).names) == 6
    assert store.verbs["list"] <= 2
