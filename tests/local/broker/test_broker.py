"""The local broker against real subscribers: what answers mean, retries, replies, dead letters, and its own limits."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web

from knapper import limits
from knapper.errors import TooMany
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.local.broker import delivery
from knapper.local.broker.broker import LocalBroker
from knapper.local.broker.delivery import HOPS_MAX, Letter
from knapper.local.broker.fault_injection import COPIES_MAX, FaultInjection
from knapper.local.broker.subscribers import Subscribers
from knapper.store.memory import MemoryStore

SAMPLED = Event(type=cloudevents.ROLLOUTS_SAMPLED, subject="local/a/0123456789abcdef", id="1", step=3, kind="rl")
Answer = Callable[[web.Request, int], Awaitable[web.Response]]


@dataclass
class Subscriber:
    """A real server. `answer` is given each request and how many came before."""

    answer: Answer
    heard: list[dict[str, str]] = field(default_factory=list)
    dead: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    async def reward(self, request: web.Request) -> web.StreamResponse:
        self.heard.append({name.lower(): value for name, value in request.headers.items()})
        return await self.answer(request, len(self.heard) - 1)

    async def bury(self, request: web.Request) -> web.StreamResponse:
        self.dead.append({name.lower(): value for name, value in request.headers.items()})
        return web.Response(status=204)


@asynccontextmanager
async def broker_of(
    answer: Answer, faults: FaultInjection | None = None
) -> AsyncIterator[tuple[LocalBroker, Subscriber]]:
    subscriber = Subscriber(answer)
    app = web.Application()
    app.router.add_post("/reward", subscriber.reward)
    app.router.add_post("/dead", subscriber.bury)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    subscriber.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with aiohttp.ClientSession() as client:
        subscribers = Subscribers(MemoryStore(), {"reward": f"{subscriber.url}/reward"})
        broker = LocalBroker(client, subscribers.url_of, f"{subscriber.url}/dead", faults)
        yield broker, subscriber
        await broker.close()
    await runner.cleanup()


async def settled(broker: LocalBroker) -> None:
    while broker._under_way:
        await asyncio.wait(set(broker._under_way))
        await asyncio.sleep(0)


def letter(event: Event = SAMPLED) -> Letter:
    return Letter(*cloudevents.as_binary(*event.encode()))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_BACK_OFF_S", 0.001)
    monkeypatch.setattr(delivery, "_BACK_OFF_MAX_S", 0.002)


def always(status: int, body: str = "", headers: dict[str, str] | None = None) -> Answer:
    async def answer(_: web.Request, __: int) -> web.Response:
        return web.Response(status=status, text=body, headers=headers)

    return answer


def test_an_event_reaches_who_wants_it_once_and_as_it_was() -> None:
    async def story() -> None:
        async with broker_of(always(204)) as (broker, subscriber):
            await broker.post(letter())
            await broker.post(letter(Event(type=cloudevents.TICK, subject="", id="2")))
            await settled(broker)
            assert len(subscriber.heard) == 1
            assert cloudevents.decode(subscriber.heard[0], b"") == SAMPLED
            assert subscriber.dead == []

    asyncio.run(story())


@pytest.mark.parametrize("status", [500, 503, 404, 408, 409, 429])
def test_not_now_is_tried_again_until_it_is_done(status: int) -> None:
    async def answer(_: web.Request, before: int) -> web.Response:
        return web.Response(status=status if before < 4 else 204)

    async def story() -> None:
        async with broker_of(answer) as (broker, subscriber):
            await broker.post(letter())
            await settled(broker)
            assert len(subscriber.heard) == 5
            assert subscriber.dead == []

    asyncio.run(story())


@pytest.mark.parametrize("status", [400, 401, 403, 410, 413, 422])
def test_poison_is_a_dead_letter_at_once(status: int) -> None:
    async def story() -> None:
        async with broker_of(always(status, "no such job\n")) as (broker, subscriber):
            await broker.post(letter())
            await settled(broker)
            assert len(subscriber.heard) == 1
            (dead,) = subscriber.dead
            assert dead["ce-id"] == SAMPLED.id
            assert dead["ce-knativeerrorcode"] == str(status)
            assert dead["ce-knativeerrordest"] == f"{subscriber.url}/reward"
            assert dead["ce-knativeerrordata"] == "no such job\\n"

    asyncio.run(story())


def test_who_never_answers_well_is_given_up_after_thirteen_times() -> None:
    async def story() -> None:
        async with broker_of(always(503)) as (broker, subscriber):
            await broker.post(letter())
            await settled(broker)
            assert len(subscriber.heard) == 13
            assert [each["ce-knativeerrorcode"] for each in subscriber.dead] == ["503"]

    asyncio.run(story())


def test_retry_after_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(_: web.Request, before: int) -> web.Response:
        return web.Response(status=503, headers={"Retry-After": "7"}) if before == 0 else web.Response(status=204)

    async def story() -> None:
        async with broker_of(answer) as (broker, _):
            slept: list[float] = []

            async def sleep(seconds: float) -> None:
                slept.append(seconds)

            monkeypatch.setattr(broker._delivery, "_sleep", sleep)
            await broker.post(letter())
            await settled(broker)
            assert slept == [7.0]

    asyncio.run(story())


def test_an_answer_that_is_no_event_is_an_error_as_knative_takes_it() -> None:
    """The `OK` of a functions_framework.cloud_event function: delivered again and again."""

    async def story() -> None:
        async with broker_of(always(200, "OK")) as (broker, subscriber):
            await broker.post(letter())
            await settled(broker)
            assert len(subscriber.heard) == 13
            assert [each["ce-knativeerrorcode"] for each in subscriber.dead] == ["502"]

    asyncio.run(story())


def test_a_chain_of_replies_ends_after_255_hops_and_one_of_posts_does_not() -> None:
    async def story(post: bool) -> int:
        async def answer(request: web.Request, before: int) -> web.Response:
            bell = SAMPLED.next(cloudevents.ROLLOUTS_SAMPLED, "test", before)
            if before >= 499:
                return web.Response(status=204)
            if post:
                await broker.post(letter(bell))
                return web.Response(status=204)
            headers, _ = bell.encode()
            return web.Response(status=200, headers=headers)

        async with broker_of(answer) as (broker, subscriber):
            await broker.post(letter())
            await settled(broker)
            return len(subscriber.heard)

    assert asyncio.run(story(post=False)) == HOPS_MAX
    assert asyncio.run(story(post=True)) == 500


def test_too_many_under_way_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "events_in_flight_max", 3)

    async def answer(_: web.Request, __: int) -> web.Response:
        await asyncio.sleep(0.05)
        return web.Response(status=204)

    async def story() -> None:
        async with broker_of(answer) as (broker, subscriber):
            for _ in range(3):
                await broker.post(letter())
            with pytest.raises(TooMany, match="allowed: 3"):
                await broker.post(letter())
            await settled(broker)
            await broker.post(letter())
            await settled(broker)
            assert len(subscriber.heard) == 4

    asyncio.run(story())


def test_fault_injection_duplicates_drops_and_reorders_and_a_seed_is_a_history() -> None:
    counts = [len(FaultInjection(3).copies()) for _ in range(1)] + [len(each) for each in _copies(3, 999)]
    assert set(counts) == set(range(COPIES_MAX + 1))
    assert 0.15 < counts.count(0) / len(counts) < 0.25
    assert _copies(3, 50) == _copies(3, 50) != _copies(4, 50)

    async def story() -> None:
        async with broker_of(always(204), FaultInjection(3)) as (broker, subscriber):
            for n in range(40):
                await broker.post(letter(SAMPLED.next(cloudevents.ROLLOUTS_SAMPLED, "test", n)))
            await settled(broker)
            steps = [int(each["ce-step"]) for each in subscriber.heard]
            assert steps != sorted(steps)
            assert len(steps) > len(set(steps))
            assert set(range(40)) - set(steps)

    asyncio.run(story())


def _copies(seed: int, count: int) -> list[list[float]]:
    faults = FaultInjection(seed)
    return [faults.copies() for _ in range(count)]


def test_a_reply_that_finds_the_broker_full_is_no_reply_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(_: web.Request, before: int) -> web.Response:
        monkeypatch.setattr(limits, "events_in_flight_max", 4096 if before else 0)
        if before >= 2:
            return web.Response(status=204)
        headers, _body = SAMPLED.next(cloudevents.ROLLOUTS_SAMPLED, "test", 9).encode()
        return web.Response(status=200, headers=headers)

    async def story() -> None:
        async with broker_of(answer) as (broker, subscriber):
            await broker.post(letter())
            await settled(broker)
            assert [each["ce-step"] for each in subscriber.heard] == ["3", "3", "9"]
            assert subscriber.dead == []

    asyncio.run(story())
