"""Prompts of earlier requests: found by what they have in common, of one adapter only, and bounded."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from knapper.engine.sampling.prefix_cache import COMMON_MIN, PrefixCache
from knapper.wire.types import SampleOutput
from tests.engine.sampling.test_scheduler import House, prompt_of, request, same, until

LAST = torch.zeros(1, 4)


def prefix_cache(
    *prompts: tuple[str, np.ndarray[Any, Any]],
    tokens_max: int = 1000,
    reusable: Callable[[Any, int], int] = lambda _, tokens: tokens,
) -> PrefixCache:
    filled = PrefixCache(tokens_max, reusable)
    for adapter, tokens in prompts:
        add(filled, adapter, tokens)
    return filled


def add(cache: PrefixCache, adapter: str, tokens: np.ndarray[Any, Any]) -> None:
    """Its past is its length."""
    cache.add(adapter, tokens, len(tokens), LAST, len(tokens))


def common(cache: PrefixCache, adapter: str, tokens: np.ndarray[Any, Any], most: int = 10**6) -> int:
    match = cache.find(adapter, tokens, most)
    return 0 if match is None else match[1]


def test_the_longest_common_beginning_of_the_same_adapter_is_found() -> None:
    prompt = prompt_of(200)
    other = prompt.copy()
    other[120:] += 1
    cache = prefix_cache(("a", prompt[:100]), ("b", prompt), ("a", other))
    assert common(cache, "a", prompt) == 120
    assert common(cache, "b", prompt[:150]) == 149  # the last row was not kept
    assert common(cache, "b", prompt) == 200
    assert common(cache, "b", prompt, most=80) == 80
    assert common(cache, "c", prompt) == 0


def test_short_beginnings_are_computed_again_unless_all_is_the_same() -> None:
    prompt = prompt_of(60)
    cache = prefix_cache(("", prompt[:COMMON_MIN]), ("", prompt[:5]))
    assert common(cache, "", prompt) == COMMON_MIN
    assert common(cache, "", prompt[: COMMON_MIN - 1]) == 0
    assert common(cache, "", prompt[:5]) == 5


def test_a_model_that_cannot_go_on_from_a_part_takes_the_same_prompt_only() -> None:
    prompt = prompt_of(90)
    cache = prefix_cache(("", prompt[:80]), ("", prompt), reusable=lambda _past, _tokens: 0)
    assert (common(cache, "", prompt[:80]), common(cache, "", prompt), len(cache)) == (80, 90, 2)
    assert common(cache, "", prompt[:85]) == 0


def test_of_a_model_with_states_an_earlier_prompt_is_reused_where_it_has_one_and_kept_where_no_other_has() -> None:
    def reusable(past: int, tokens: int) -> int:
        return max((stop for stop in (64, past) if stop <= tokens), default=0)

    prompt = prompt_of(150)
    cache = prefix_cache(("", prompt[:64]), ("", prompt[:100]), ("", prompt), reusable=reusable)
    assert [common(cache, "", prompt[:length]) for length in (65, 80, 100, 120, 150)] == [64, 64, 100, 100, 150]
    assert len(cache) == 2  # the first is of no use beside the second


def test_a_longer_prompt_takes_the_place_of_those_that_it_begins_with() -> None:
    prompt = prompt_of(300)
    cache = prefix_cache(*(("a", prompt[:length]) for length in range(50, 300, 50)), ("b", prompt[:50]))
    assert len(cache) == 2
    assert cache.tokens == 250 + 64


def test_what_was_not_used_for_longest_goes_first_and_the_limit_holds() -> None:
    prompts = [prompt_of(100, seed) for seed in range(3)]
    cache = prefix_cache(*(("", prompt) for prompt in prompts), tokens_max=300)
    assert cache.tokens == 300
    common(cache, "", prompts[0])
    add(cache, "", prompt_of(101, 9))  # one more than there is room for beside two
    assert [common(cache, "", prompt) for prompt in prompts] == [100, 0, 0]
    add(cache, "", prompt_of(301, 10))
    assert common(cache, "", prompt_of(301, 10)) == 0
    add(cache, "", prompt_of(300, 11))
    assert (common(cache, "", prompt_of(300, 11)), len(cache)) == (300, 1)
    cache.trim(299)
    assert (len(cache), cache.tokens) == (0, 0)
    assert not cache._by_start


@pytest.fixture
def house(tmp_path: Any) -> House:
    return House(tmp_path)


def group(adapter: str = "adapter-1") -> list[Any]:
    return [request(adapter=adapter, prompt=prompt_of(50), seed=seed) for seed in range(6)]


def test_a_group_sent_as_requests_of_one_computes_its_prompt_once(house: House) -> None:
    outputs = house.run(*group())
    outputs += [output for entry in group() for output in house.run(entry)]
    counters = house.sampler.counters
    assert (counters.prefilled_tokens, counters.reused_tokens, counters.prefills) == (50, 11 * 50, 1)
    assert [output.prompt_cache_hit_tokens for output in outputs] == [0] + 11 * [50]
    assert all(same(a.sequences[0], b.sequences[0]) for a, b in zip(outputs, outputs[6:], strict=False))
    house.run(*group("adapter-2"), *group(""))
    assert counters.prefilled_tokens == 150  # another adapter's keys and values are others


def test_reuse_changes_no_bit_and_asked_rows_are_computed(house: House, tmp_path: Any) -> None:
    prompt = prompt_of(140)
    first = request(adapter="adapter-3", prompt=prompt[:100])
    requests = [
        request(adapter="adapter-3", prompt=prompt, topk_sample_logprobs=3),
        request(adapter="adapter-3", prompt=prompt, prompt_logprobs=True, prompt_logprobs_last_n=20),
        request(adapter="adapter-3", prompt=prompt, prompt_logprobs=True),
    ]
    house.run(first)
    for entry, reused in zip(requests, (100, 119, 0), strict=True):
        (warm,), (cold,) = house.run(entry), House(tmp_path).run(entry)
        assert (warm.prompt_cache_hit_tokens, cold.prompt_cache_hit_tokens) == (reused, 0)
        assert same(warm.sequences[0], cold.sequences[0])
        if entry.prompt_logprobs:
            assert warm.prompt_logprobs is not None
            assert cold.prompt_logprobs is not None
            np.testing.assert_array_equal(warm.prompt_logprobs, cold.prompt_logprobs)


def test_earlier_prompts_give_way_to_texts(tmp_path: Any) -> None:
    house = House(tmp_path, slots_max=4, kv_tokens_max=512)
    house.run(request(prompt=prompt_of(100), max_tokens=10))
    assert house.sampler._scheduler._prefiller.cached_tokens == 100
    held: list[int] = []

    async def story() -> SampleOutput:
        work = house.sampler.sample(request(prompt=prompt_of(9), max_tokens=50, num_samples=8))
        task = asyncio.ensure_future(work)
        await until(lambda: house.sampler.active == 4 or task.done())
        held.append(house.sampler._scheduler._prefiller.cached_tokens)
        return await task

    house.within(story())
    assert held[0] + 4 * 64 <= 512
    house.run(request(prompt=prompt_of(300, 3), max_tokens=100))  # reserves 512: all there is
    assert house.sampler._scheduler._prefiller.cached_tokens <= 128


def test_memory_is_flat_over_a_thousand_requests(house: House) -> None:
    house.run(*(request(prompt=prompt_of(3 + n % 20, n), seed=n, max_tokens=1) for n in range(500)))
    cached_then = house.sampler._scheduler._prefiller.cached_tokens
    house.run(*(request(prompt=prompt_of(3 + n % 20, n), seed=n, max_tokens=1) for n in range(500, 1000)))
    assert house.sampler.counters.finished == 1000
    assert 0 < cached_then <= 8192 // 4
    assert 0 < house.sampler._scheduler._prefiller.cached_tokens <= 8192 // 4
    entries = house.sampler._scheduler._prefiller._prefix_cache._entries.values()
    assert sum(entry.past.kv.shape[2] for entry in entries) <= 8192 // 4
    assert house.sampler._scheduler._cache.tokens == 0
