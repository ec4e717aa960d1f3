"""Adapters of samples are kept by their bytes: the longest unused go first, and none that is in use."""

import asyncio
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

import pytest
import torch

from knapper.engine.layers.lora import Lora
from knapper.engine.sampling.adapter_cache import AdapterCache
from knapper.errors import NotFound, OutOfMemory, Unavailable
from tests.engine.faults import gpu_error

T = TypeVar("T")
CPU = torch.device("cpu")
ONE = 2 * 4 * 8 * 16  # bytes of one adapter


class AdapterDict:
    """`short`: how many loads from now on lack memory."""

    def __init__(self) -> None:
        self.loads: list[str] = []
        self.short = 0

    async def load(self, adapter: str) -> Lora:
        self.loads.append(adapter)
        await asyncio.sleep(0)
        if self.short:
            self.short -= 1
            raise gpu_error()
        if adapter.startswith("no"):
            raise NotFound(f"no adapter {adapter}")
        return Lora({"site": torch.zeros(8, 16)}, {"site": torch.zeros(16, 8)}, 1.0)


def within(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 10))


async def used(cache: AdapterCache, *adapters: str) -> None:
    for adapter in adapters:
        async with cache.use(adapter) as lora:
            assert lora.nbytes == ONE


def test_as_many_bytes_are_kept_as_there_is_room_for_and_one_more_takes_the_longest_unused() -> None:
    adapter_dict = AdapterDict()

    async def story() -> None:
        cache = AdapterCache(adapter_dict, CPU, 3 * ONE)
        await used(cache, "a", "b", "c", "a", "b", "c")
        assert adapter_dict.loads == ["a", "b", "c"]
        assert cache.bytes == 3 * ONE
        await used(cache, "a", "d")
        assert cache.bytes == 3 * ONE
        await used(cache, "a", "c", "d")
        assert adapter_dict.loads == ["a", "b", "c", "d"], "b was unused for longest"
        await used(cache, "b")
        assert adapter_dict.loads[4:] == ["b"]

    within(story())


def test_one_byte_less_keeps_one_less() -> None:
    adapter_dict = AdapterDict()

    async def story() -> None:
        cache = AdapterCache(adapter_dict, CPU, 3 * ONE - 1)
        await used(cache, "a", "b", "c")
        assert cache.bytes == 2 * ONE

    within(story())


def test_those_in_use_stay_whatever_they_take() -> None:
    adapter_dict = AdapterDict()

    async def story() -> None:
        cache = AdapterCache(adapter_dict, CPU, ONE)
        async with AsyncExitStack() as held:
            for adapter in "abcd":
                await held.enter_async_context(cache.use(adapter))
            assert cache.bytes == 4 * ONE
            await used(cache, "a", "b", "e", "c", "d")
            assert adapter_dict.loads == ["a", "b", "c", "d", "e"]
            assert cache.bytes == 4 * ONE, "the unused one was evicted"
        assert cache.bytes == ONE

    within(story())


def test_several_that_want_it_load_it_once_and_one_that_leaves_takes_it_from_nobody() -> None:
    adapter_dict = AdapterDict()

    async def story() -> None:
        cache = AdapterCache(adapter_dict, CPU, 0)
        first, second = asyncio.ensure_future(used(cache, "a")), asyncio.ensure_future(used(cache, "a"))
        await asyncio.sleep(0)
        first.cancel()
        await second
        assert adapter_dict.loads == ["a"]
        assert cache.bytes == 0

    within(story())


def test_a_failed_load_is_heard_by_who_waits_and_tried_again() -> None:
    adapter_dict = AdapterDict()

    async def story() -> None:
        cache = AdapterCache(adapter_dict, CPU, ONE)
        for _ in range(2):
            with pytest.raises(NotFound):
                await used(cache, "none")
        assert adapter_dict.loads == ["none", "none"]

    within(story())


def test_a_load_that_lacks_memory_takes_that_of_unused_ones() -> None:
    adapter_dict = AdapterDict()

    async def story() -> None:
        cache = AdapterCache(adapter_dict, CPU, 3 * ONE)
        await used(cache, "a", "b")
        adapter_dict.short = 1
        await used(cache, "c")
        assert cache.bytes == ONE
        adapter_dict.short = 2
        with pytest.raises(OutOfMemory, match=r"adapter d does not fit into the server's memory: it needs 1024 GiB"):
            await used(cache, "d")
        async with cache.use("c"):
            adapter_dict.short = 2
            with pytest.raises(Unavailable, match="adapter d does not fit beside those that other samples use now"):
                await used(cache, "d")
        await used(cache, "d")

    within(story())
