"""Texts take memory as they grow; who is parked where it ends comes out the same, later, and none waits for ever."""

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from knapper.engine.sampling.decode_batch import GROWTH
from knapper.wire.progress import TokenEvent
from knapper.wire.types import SampleOutput, SampleRequest
from tests.engine.sampling.test_scheduler import House, prompt_of, request, same, until
from tests.engine.strange import strange_model
from tests.engine.test_scarcity import nothing_left
from tests.engine.tiny import tiny_model

MEMORY = 704  # positions: two texts of 10 tokens start, and both cannot come to 400


def house_of(directory: Path, kind: str = "llama", **options: Any) -> House:
    make = partial(tiny_model, context=1024) if kind == "llama" else partial(strange_model, kind=kind)
    return House(directory, make=make, **options)


def long_ones(count: int, max_tokens: int | None = 400, **fields: Any) -> list[SampleRequest]:
    fields = {"adapter": "adapter-1", "max_tokens": max_tokens, **fields}
    return [request(prompt=prompt_of(10 + n, n), seed=n, **fields) for n in range(count)]


@pytest.mark.parametrize("kind", ["llama", "lfm2", "qwen3_5"])
def test_a_text_that_was_parked_for_another_to_grow_has_the_bits_that_it_has_alone(tmp_path: Path, kind: str) -> None:
    """Of attention alone, and with states: all of a text that is computed again, states too, is what it was."""
    requests = long_ones(3)
    house = house_of(tmp_path, kind)
    extra = house.sampler._scheduler.positions(1) - 64
    tight = house_of(tmp_path, kind, kv_tokens_max=MEMORY + 2 * extra)
    allocated: list[int] = []

    async def heard(sample_request: SampleRequest) -> SampleOutput:
        def listen(_: TokenEvent) -> None:
            allocated.append(tight.sampler._scheduler._cache._cache.allocated)  # type: ignore[attr-defined]  # of a native model

        return await tight.sampler.sample(sample_request, listen)

    async def together() -> list[SampleOutput]:
        return list(await asyncio.gather(*map(heard, requests)))

    outputs = tight.within(together())
    assert tight.sampler.counters.parked > 0
    assert 0 < max(allocated) <= tight.sampler._kv_tokens_max
    for output, alone in zip(outputs, (house.run(each)[0] for each in requests), strict=True):
        assert same(output.sequences[0], alone.sequences[0])
    assert nothing_left(tight)


def test_requests_for_all_that_the_context_holds_decode_together(tmp_path: Path) -> None:
    """The SDK's default, max_tokens None: each may come to 1,024 positions, and 2,048 are there."""
    house = house_of(tmp_path, kv_tokens_max=2048)
    seen: list[int] = []

    async def story() -> None:
        tasks = [asyncio.ensure_future(house.sampler.sample(each)) for each in long_ones(6, None)]
        await until(lambda: house.sampler.counters.steps >= 3)
        seen.append(house.sampler.active)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: nothing_left(house))

    house.within(story())
    assert seen == [6]


def test_the_oldest_texts_of_a_tenant_go_on_and_all_end(tmp_path: Path) -> None:
    house, ended = house_of(tmp_path, kv_tokens_max=MEMORY), []

    async def one(number: int, sample_request: SampleRequest) -> None:
        output = await house.sampler.sample(sample_request)
        assert output.sequences[0].tokens.size == 400
        ended.append(number)

    async def story() -> None:
        await asyncio.gather(*(one(n, each) for n, each in enumerate(long_ones(4))))

    house.within(story())
    assert ended == sorted(ended)
    assert 0 < house.sampler.counters.parked <= 2 * 400 * 4 / GROWTH, "once in so many steps"


def test_a_tenant_does_not_wait_for_all_texts_of_another_that_were_parked(tmp_path: Path) -> None:
    """The greedy one's have had more tokens: they give way, and go on when the other's texts have ended."""
    house, order = house_of(tmp_path, kv_tokens_max=MEMORY), []

    async def one(name: str, sample_request: SampleRequest) -> None:
        await house.sampler.sample(sample_request)
        order.append(name)

    async def story() -> None:
        greedy = [asyncio.ensure_future(one("greedy", each)) for each in long_ones(4, tenant="greedy")]
        await until(lambda: house.sampler.counters.parked > 0)
        await one("modest", request(max_tokens=300, tenant="modest"))
        await asyncio.gather(*greedy)

    house.within(story())
    assert order.index("modest") <= 1
    assert nothing_left(house)
