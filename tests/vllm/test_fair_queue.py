"""Slots go round: no tenant and no adapter waits behind another's thousand."""

import asyncio
from collections.abc import Callable, Coroutine

from knapper.vllm.fair_queue import SlotQueue


def play(story: Coroutine[None, None, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 10))


async def begin_all(
    slots: SlotQueue, order: list[str], *who: tuple[str, str]
) -> list[asyncio.Task[Callable[[object], None]]]:
    """Submit all, in this order; `order` records who got a slot."""

    async def begin(tenant: str, adapter: str) -> Callable[[object], None]:
        leave = await slots.take(tenant, adapter)
        order.append(f"{tenant}/{adapter}")
        return leave

    tasks = [asyncio.create_task(begin(*each)) for each in who]
    await asyncio.sleep(0.01)
    return tasks


def test_a_slot_goes_to_the_tenant_with_the_fewest_texts() -> None:
    async def story() -> None:
        slots, order = SlotQueue(2, 8), list[str]()
        tasks = await begin_all(slots, order, *[("greedy", "a")] * 6, ("modest", "b"))
        assert order == ["greedy/a", "greedy/a"]
        tasks[0].result()(None)
        await asyncio.sleep(0.01)
        assert order[2:] == ["modest/b"]
        assert slots.active == 2

    play(story())


def test_and_there_to_the_adapter_with_the_fewest() -> None:
    async def story() -> None:
        slots, order = SlotQueue(2, 8), list[str]()
        tasks = await begin_all(slots, order, *[("one", "a")] * 4, ("one", "b"))
        tasks[0].result()(None)
        await asyncio.sleep(0.01)
        assert order == ["one/a", "one/a", "one/b"]

    play(story())


def test_an_adapter_beyond_those_at_once_waits_and_comes_in_the_end() -> None:
    async def story() -> None:
        slots, order = SlotQueue(4, 1), list[str]()
        tasks = await begin_all(slots, order, *[("one", "a")] * 2, ("two", "b"), ("one", ""))
        assert order == ["one/a", "one/a", "one/"]
        for task in tasks[:2]:
            task.result()(None)
        await asyncio.sleep(0.01)
        assert order[3:] == ["two/b"]

    play(story())


def test_others_cannot_keep_it_out_for_ever() -> None:
    async def story() -> None:
        slots, order = SlotQueue(2, 1), list[str]()
        holding = await slots.take("one", "a")
        (late,) = await begin_all(slots, order, ("two", "b"))
        for _ in range(200):  # a slot is free, and adapter a asks for it again and again
            (task,) = await begin_all(slots, order, ("one", "a"))
            if not task.done():
                break
            task.result()(None)
        else:
            raise AssertionError("adapter b was passed over 200 times")
        holding(None)
        await asyncio.sleep(0.01)
        assert late.done()

    play(story())


def test_who_stops_waiting_takes_no_slot() -> None:
    async def story() -> None:
        slots, order = SlotQueue(1, 8), list[str]()
        first, second, third = await begin_all(slots, order, ("one", ""), ("two", ""), ("three", ""))
        second.cancel()
        first.result()(None)
        await asyncio.sleep(0.01)
        assert order == ["one/", "three/"]
        third.result()(None)
        assert slots.active == 0

    play(story())
