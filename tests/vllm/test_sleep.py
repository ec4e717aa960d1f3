"""A core sleeps when it is idle, and its neighbour has its memory meanwhile. No GPU was to be had: the order of calls.

Only vLLM's `AsyncLLM` is a stub: it takes the calls that vLLM 0.32 has, in the order in which it can take them.
"""

import asyncio
import inspect
from types import SimpleNamespace

import pytest
from vllm.v1.engine.async_llm import AsyncLLM

from knapper.vllm.core import Core
from knapper.vllm.engine import CoreLifecycle


class Sleeper:
    """`calls`, and those of the neighbour between them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.errored = self.asleep = False
        processes = SimpleNamespace(engine_manager=SimpleNamespace(processes=[]))
        self.engine_core = SimpleNamespace(resources=processes)

    async def collective_rpc(self, method: str) -> None:
        assert not self.asleep
        self.calls.append(method)

    async def sleep(self, level: int = 1) -> None:
        assert not self.asleep
        self.asleep = True
        self.calls.append(f"sleep {level}")

    async def wake_up(self) -> None:
        assert self.asleep
        self.asleep = False
        self.calls.append("wake_up")

    async def lend(self) -> None:
        assert self.asleep, "its memory is not free yet"
        self.calls.append("lend")

    async def reclaim(self) -> None:
        assert self.asleep, "it takes its memory before it is free"
        self.calls.append("reclaim")


@pytest.mark.parametrize("method", ["sleep", "wake_up", "collective_rpc"])
def test_vllm_has_the_calls_of_the_stub(method: str) -> None:
    theirs, ours = (inspect.signature(getattr(each, method)).parameters for each in (AsyncLLM, Sleeper))
    assert list(ours) == list(theirs)[: len(ours)]


def test_the_neighbour_has_the_memory_while_the_core_sleeps_and_not_before_or_after() -> None:
    llm = Sleeper()
    engine = CoreLifecycle(lambda: Core(llm, sleeps=True), idle_s=0.05, neighbour=llm)

    async def story() -> None:
        for _ in range(2):
            async with engine.use():
                await asyncio.sleep(0.2)  # longer than the idle time: it is not idle
                assert not llm.asleep
            async with asyncio.timeout(10):
                while "lend" not in llm.calls[-1:]:  # noqa: ASYNC110  nobody waits for it but this test
                    await asyncio.sleep(0.01)

    asyncio.run(story())
    assert llm.calls == ["knapper_patch", "sleep 1", "lend", "reclaim", "wake_up", "sleep 1", "lend"]
    assert engine.starts == 1


def test_a_core_that_fell_asleep_before_its_first_sample_wakes_for_it() -> None:
    llm = Sleeper()
    engine = CoreLifecycle(lambda: Core(llm, sleeps=True), idle_s=0.05, neighbour=llm)

    async def story() -> None:
        engine.begin()
        async with asyncio.timeout(10):
            while not llm.asleep:  # noqa: ASYNC110  nobody waits for it but this test
                await asyncio.sleep(0.01)
        async with engine.use():
            assert not llm.asleep

    asyncio.run(story())
    assert llm.calls[:5] == ["sleep 1", "lend", "reclaim", "wake_up", "knapper_patch"]
