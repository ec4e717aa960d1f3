"""What is kept in memory: what, for how long, and how often it is loaded."""

import asyncio

import pytest

from knapper.store.cache import LruCache


class Loads:
    """What is loaded, and what is waited for."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.may_end = asyncio.Event()
        self.fails = False

    async def load(self, key: str) -> str:
        self.begun.append(key)
        await self.may_end.wait()
        if self.fails:
            raise OSError(key)
        return f"{key}-{len(self.begun)}"


def test_the_longest_unused_value_goes_first() -> None:
    cache: LruCache[str, int] = LruCache(2)
    cache.keep("a", 1)
    cache.keep("b", 2)
    assert cache.known("a") == 1
    cache.keep("c", 3)
    assert (cache.known("a"), cache.known("b"), cache.known("c")) == (1, None, 3)
    cache.keep("a", 4)
    assert (cache.known("a"), sorted(cache.known_keys())) == (4, ["a", "c"])
    cache.forget("a")
    assert cache.known_keys() == ["c"]


def test_values_count_by_their_size() -> None:
    cache: LruCache[str, bytes] = LruCache(10, len)
    cache.keep("a", bytes(4))
    cache.keep("b", bytes(6))
    assert (sorted(cache.known_keys()), cache.size) == (["a", "b"], 10)
    cache.keep("a", bytes(5))
    assert (cache.known_keys(), cache.size) == (["a"], 5)
    cache.keep("c", bytes(11))
    assert cache.known_keys() == ["a"]
    cache.keep("a", bytes(11))
    assert cache.known_keys() == []


def test_without_an_event_loop_each_loads_for_itself() -> None:
    """As the journal does, whose simulation steps through its coroutines by hand."""
    loads, cache = Loads(), LruCache[str, str]()
    loads.may_end.set()
    for _ in range(2):
        with pytest.raises(StopIteration, match="a-1"):
            cache.get("a", lambda: loads.load("a")).send(None)
    assert loads.begun == ["a"]


def test_a_value_is_loaded_once_however_many_ask() -> None:
    async def scenario() -> None:
        loads, cache = Loads(), LruCache[str, str]()
        asking = [asyncio.create_task(cache.get_once("a", lambda: loads.load("a"))) for _ in range(3)]
        await asyncio.sleep(0)
        loads.may_end.set()
        assert await asyncio.gather(*asking) == ["a-1"] * 3
        assert await cache.get_once("a", lambda: loads.load("a")) == "a-1"
        assert loads.begun == ["a"]

    asyncio.run(scenario())


def test_a_load_goes_on_when_its_first_caller_leaves() -> None:
    async def scenario() -> None:
        loads, cache = Loads(), LruCache[str, str]()
        first, second = (asyncio.create_task(cache.get_once("a", lambda: loads.load("a"))) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        loads.may_end.set()
        assert await second == "a-1"
        assert first.cancelled()

    asyncio.run(scenario())


def test_a_failure_is_told_to_all_who_wait_and_is_not_kept() -> None:
    async def scenario() -> None:
        loads, cache = Loads(), LruCache[str, str]()
        loads.fails = True
        asking = [asyncio.create_task(cache.get_once("a", lambda: loads.load("a"))) for _ in range(2)]
        await asyncio.sleep(0)
        loads.may_end.set()
        for each in asking:
            with pytest.raises(OSError, match="a"):
                await each
        loads.fails = False
        assert await cache.get_once("a", lambda: loads.load("a")) == "a-2"

    asyncio.run(scenario())


@pytest.mark.parametrize("forgotten", [True, False])
def test_what_was_forgotten_or_replaced_while_it_was_loaded_stays_so(forgotten: bool) -> None:
    async def scenario() -> None:
        loads, cache = Loads(), LruCache[str, str]()
        asking = asyncio.create_task(cache.get_once("a", lambda: loads.load("a")))
        await asyncio.sleep(0)
        if forgotten:
            cache.forget("a")
        else:
            cache.keep("a", "newer")
        loads.may_end.set()
        assert await asking == "a-1"
        assert cache.known("a") == (None if forgotten else "newer")

    asyncio.run(scenario())
