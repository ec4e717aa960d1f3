"""Where a session's samples are taken: the same gateway whoever is asked, whatever clocks say and whoever joins."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from knapper.state.gateways import IDLE_S, LISTED_S, SETTLED_S, Gateways
from knapper.store.memory import MemoryStore
from tests.gateway.hours import CountingStore


class Times:
    """Of one machine: `ahead` of the others."""

    def __init__(self) -> None:
        self.now = 1000.0

    def gateway(self, store: MemoryStore, name: str, ahead: float = 0.0) -> Gateways:
        return Gateways(store, name * 32, f"http://{name}:8012", lambda: self.now + ahead, lambda: self.now)


def homes(gateway: Gateways, created_at: float, count: int = 64, gone: tuple[str, ...] = ()) -> list[str]:
    found = [gateway.home(f"ses-{n}", created_at, gone) for n in range(count)]
    return [member.gateway[0] for member in found if member is not None]


def told(story: Callable[[Times, MemoryStore], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(story(Times(), MemoryStore()))


def test_a_newcomer_takes_only_sessions_that_come_after_it() -> None:
    async def story(times: Times, store: MemoryStore) -> None:
        a, b = times.gateway(store, "a"), times.gateway(store, "b")
        await a.publish()
        times.now += 10 * SETTLED_S
        await b.publish()
        joined = times.now
        times.now += LISTED_S
        for each in (a, b):
            await each.publish()
            assert set(homes(each, joined)) == {"a"}
            assert min(Counter(homes(each, joined + SETTLED_S)).values()) > 16, "both take some"

    told(story)


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_all_say_the_same_whatever_their_clocks_say(ahead: float) -> None:
    async def story(times: Times, store: MemoryStore) -> None:
        a, b = times.gateway(store, "a"), times.gateway(store, "b", ahead)
        await a.publish()
        await b.publish()
        assert homes(b, times.now) == ["a"] * 64, "who was there before"
        times.now += LISTED_S
        await a.publish()
        for created_at in (0.0, times.now, times.now + ahead, times.now + 2 * SETTLED_S):
            assert homes(a, created_at) == homes(b, created_at)

    told(story)


def test_of_one_that_is_gone_only_its_sessions_move() -> None:
    async def story(times: Times, store: MemoryStore) -> None:
        gateways = [times.gateway(store, name) for name in "abc"]
        for each in gateways:
            await each.publish()
        times.now += 2 * SETTLED_S
        await gateways[0].publish()
        before, after = homes(gateways[0], times.now), homes(gateways[0], times.now, gone=("b" * 32,))
        assert "b" in before
        assert all(was in (is_now, "b") and is_now != "b" for was, is_now in zip(before, after, strict=True))

    told(story)


def test_one_whose_name_was_deleted_although_it_lives_writes_another() -> None:
    async def story(times: Times, store: MemoryStore) -> None:
        a, b = times.gateway(store, "a"), times.gateway(store, "b")
        for each in (a, b):
            await each.publish()
        (found,) = await b.others()
        await b.remove(found)
        assert await b.find("a" * 32) is None
        times.now += LISTED_S
        await a.publish()
        assert await b.find("a" * 32) is not None

    told(story)


def test_an_idle_one_has_no_name_and_one_at_work_asks_the_store_once_a_minute() -> None:
    async def story(times: Times, store: MemoryStore) -> None:
        counting = CountingStore(store)
        a = Gateways(counting, "a" * 32, "http://a:8012", lambda: times.now, lambda: times.now)
        await a.publish()
        counting.calls.clear()
        for _ in range(100):
            times.now += 1.0
            await a.publish()
        assert dict(counting.verbs) == {"list": 1}
        await a.withdraw(lambda: True)
        assert len(await store.list("")) == 1, "it was at work just now"
        times.now += IDLE_S
        await a.withdraw(lambda: False)
        assert len(await store.list("")) == 1
        await a.withdraw(lambda: True)
        assert await store.list("") == []

    told(story)


def test_without_an_address_the_store_is_not_asked() -> None:
    async def story(times: Times, store: MemoryStore) -> None:
        alone = Gateways(store, "a" * 32, "", lambda: times.now, lambda: times.now)
        await alone.publish()
        assert (await alone.others(), await alone.find("b" * 32)) == ([], None)
        assert await store.list("") == []

    told(story)
