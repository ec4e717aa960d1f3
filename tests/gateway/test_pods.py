"""Two pods over one store: whichever is rung, and how, the trajectory is that of an undisturbed run."""

import asyncio
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from knapper import limits
from knapper.events.cloudevents import Done, Hint
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.records import Commit, decode
from tests.gateway.pods import Two, claimed, committed, two
from tests.gateway.running import Running, fwdbwd, gateway

LAST = 19  # operation 19 saves


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with two(tmp_path_factory.mktemp("pods"), routed=True) as running:
        yield running


@pytest.fixture(scope="module")
def calm(pods: Two) -> tuple[str, list[bytes]]:
    """Weights and results of an undisturbed run: one pod, and a doorbell after each operation."""

    async def story() -> tuple[str, list[bytes]]:
        run = await pods.make("calm")
        for seq in range(1, LAST):
            await pods.accept(run, [seq])
            await pods.a.ring(run, Hint())
        await pods.accept_save(run, LAST)
        await pods.a.ring(run, Hint())
        return await pods.weights(run), await pods.answers(run, LAST)

    return asyncio.run(story())


async def expect_calm(pods: Two, run: RunId, calm: tuple[str, list[bytes]]) -> None:
    assert await pods.answers(run, LAST) == calm[1]
    assert await pods.weights(run) == calm[0]
    assert await _answered(pods, run) == list(range(LAST + 1)), "each operation once, in order"


async def _answered(pods: Two, run: RunId) -> list[int]:
    numbers: list[int] = []
    for name in await pods.store.list(layout.commits(run)):
        data = await pods.store.get(name)
        assert data is not None
        numbers += [result.seq for result in decode(data, Commit, name).results]
    return numbers


def test_bells_to_both_to_the_wrong_one_twice_and_to_none_make_one_trajectory(
    pods: Two, calm: tuple[str, list[bytes]]
) -> None:
    draw = random.Random(5)

    async def story() -> None:
        run = await pods.make("wild")
        both = [pods.a, pods.b]
        for seq in range(1, LAST):
            await pods.accept(run, [seq])
            targets = draw.choice([both, [pods.a], [pods.b], both * 2, [pods.b, pods.b], []])
            hint = await pods.hint(run, draw.choice(["direct", "service", "lost"]))
            ways = [
                None if draw.random() < 0.3 else hint for _ in targets
            ]  # none: as an event of a job, which takes over
            await asyncio.gather(*(pod.ring(run, way) for pod, way in zip(targets, ways, strict=True)))
        await pods.accept_save(run, LAST)
        async with asyncio.timeout(60):
            while (await _answered(pods, run))[-1:] != [LAST]:
                hint = await pods.hint(run, "lost")
                await asyncio.gather(*(pod.ring(run, hint) for pod in both))
        await expect_calm(pods, run, calm)

    asyncio.run(story())


def test_a_pod_that_is_not_the_holder_says_who_is_and_takes_over_only_from_the_lost(pods: Two) -> None:
    async def story() -> None:
        run = await pods.make("polite")
        await pods.accept(run, [1, 2])
        _, _, frames = await pods.a.ring(run, Hint())
        assert committed(frames) == [0, 1, 2]
        first = claimed(frames)
        assert first is not None
        assert first.address == pods.a.address
        await pods.accept(run, [3])
        for way in ("service", "direct"):
            status, detail, _ = await pods.b.ring(run, await pods.hint(run, way))
            assert status == 503
            assert '"not_holder"' in detail
            assert pods.a.address in detail
        stale = Hint(first.holder, first.epoch - 1, "lost")
        assert (await pods.b.ring(run, stale))[0] == 503, "the gateway speaks of an earlier claim"
        _, _, frames = await pods.b.ring(run, await pods.hint(run, "lost"))
        assert committed(frames) == [3]
        assert await pods.holder(run) == pods.b.address
        await pods.accept(run, [4])
        status, detail, _ = await pods.a.ring(run, await pods.hint(run, "service"))
        assert status == 503, "it sees from the doorbell that it was taken over"
        assert pods.b.address in detail

    asyncio.run(story())


def test_a_pod_that_leaves_ends_its_slice_says_so_and_another_goes_on(
    tmp_path: Path,
) -> None:
    async def story(pods: Two) -> None:
        run = await pods.make("leaving")
        await pods.a.ring(run, Hint())
        await pods.accept(run, range(1, 150), tokens=200)
        hint = await pods.hint(run, "direct")
        working = asyncio.create_task(pods.a.ring(run, hint))
        async with asyncio.timeout(30):
            while len(await _answered(pods, run)) < 2:  # noqa: ASYNC110  another process writes it
                await asyncio.sleep(0.01)
        waiting = asyncio.create_task(pods.a.ring(run, hint))  # not before: then it might be the one that works
        await asyncio.sleep(0.2)
        pods.a.send(signal.SIGTERM)
        _, _, frames = await working
        assert isinstance(frames[-1], Done), "the slice ended, and did not break off"
        assert frames[-1].more
        status, detail, _ = await waiting
        assert status == 503
        assert "leaving" in detail
        assert pods.a.process is not None
        pods.a.process.wait(20)
        async with asyncio.timeout(90):
            while (await _answered(pods, run))[-1] < 149:  # a slow machine takes more than one slice
                await pods.b.ring(run, await pods.hint(run, "lost"))
        assert await _answered(pods, run) == [*range(150)]

    with two(tmp_path, routed=True) as running:
        asyncio.run(story(running))


def test_a_gateway_rings_the_holder_and_the_service_once_it_is_lost(pods: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held by one pod while the service leads to the other; killed; come back; stopped."""
    monkeypatch.setattr(limits, "holder_timeout_s", 1.0)

    def holder() -> str:
        return asyncio.run(pods.holder(RunId(run)))

    def pass_and_wait(gateway: Running, seq: int) -> None:
        gateway.forward_backward(fwdbwd(run, seq)).raise_for_status()
        body = {"request_id": f"{run}:{seq}"}
        while (answer := gateway.http.post("retrieve_future", json=body)).status_code == 408:
            pass  # told after a second what it waits for
        assert answer.status_code == 200, answer.text

    with gateway(pods.store, train_step_url=pods.a.address) as by_a, gateway(
        pods.store, model=None, train_step_url=pods.b.address
    ) as by_b:  # fmt: skip
        run = by_a.make_run()
        pass_and_wait(by_a, 1)
        assert holder() == pods.a.address
        pass_and_wait(by_b, 2)
        assert holder() == pods.a.address, "it was rung, though the service leads elsewhere"
        pods.a.stop()
        pass_and_wait(by_b, 3)
        assert holder() == pods.b.address
        pods.a.start()
        pods.a.wait()
        pass_and_wait(by_a, 4)
        assert holder() == pods.b.address
        pods.b.send(signal.SIGSTOP)
        try:
            pass_and_wait(by_a, 5)
            assert holder() == pods.a.address
        finally:
            pods.b.send(signal.SIGCONT)
        pass_and_wait(by_b, 6)
        assert holder() == pods.a.address


def test_a_holder_that_slept_through_a_takeover_writes_nothing_that_counts(
    pods: Two, calm: tuple[str, list[bytes]]
) -> None:
    """SIGSTOP in the middle of its work, at ten places; SIGCONT when the other has done it all."""

    async def story(index: int) -> None:
        run = await pods.make(f"zombie{index}")
        await pods.a.ring(run, Hint())
        await pods.accept(run, range(1, LAST))
        sleeping = asyncio.create_task(pods.a.ring(run, await pods.hint(run, "direct")))
        await asyncio.sleep(0.002 * index)
        pods.a.send(signal.SIGSTOP)
        try:
            await pods.accept_save(run, LAST)
            await pods.b.ring(run, await pods.hint(run, "lost"))
            await expect_calm(pods, run, calm)
            before = await pods.store.list(layout.commits(run)), await pods.store.list(layout.manifests(run))
        finally:
            pods.a.send(signal.SIGCONT)
        await asyncio.gather(sleeping, return_exceptions=True)
        status, detail, _ = await pods.a.ring(run, await pods.hint(run, "service"))
        assert status == 503
        assert pods.b.address in detail
        assert (await pods.store.list(layout.commits(run)), await pods.store.list(layout.manifests(run))) == before
        await expect_calm(pods, run, calm)

    for index in range(10):
        asyncio.run(story(index))
