"""Two pods over one store: whoever is rung, in whatever way, there is one trajectory, and it is the undisturbed one's."""

import asyncio
import random
import signal
from collections.abc import Iterator

import pytest

from knapper.events import Hint
from knapper.ids import RunId
from knapper.journal import names
from knapper.journal.records import Commit, decode
from tests.gateway.pods import Two, claimed, committed, two

LAST = 19  # operation 19 saves


@pytest.fixture(scope="module")
def pods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with two(tmp_path_factory.mktemp("pods"), routed=True) as running:
        yield running
        assert "Traceback" not in running.a.said() + running.b.said()


@pytest.fixture(scope="module")
def calm(pods: Two) -> tuple[str, list[bytes]]:
    """Weights and answers of the run that nobody disturbs: one pod, a bell after each operation."""

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
    found: list[int] = []
    for name in await pods.store.list(names.commits(run)):
        data = await pods.store.get(name)
        assert data is not None
        found += [result.seq for result in decode(data, Commit, name).results]
    return found


def test_bells_to_both_to_the_wrong_one_twice_and_to_none_make_one_trajectory(
    pods: Two, calm: tuple[str, list[bytes]]
) -> None:
    draw = random.Random(5)

    async def story() -> None:
        run = await pods.make("wild")
        both = [pods.a, pods.b]
        for seq in range(1, LAST):
            await pods.accept(run, [seq])
            rung = draw.choice([both, [pods.a], [pods.b], both * 2, [pods.b, pods.b], []])
            hint = await pods.hint(run, draw.choice(["direct", "service", "lost"]))
            ways = [None if draw.random() < 0.3 else hint for _ in rung]  # none: as an event of a job, which takes over
            await asyncio.gather(*(pod.ring(run, way) for pod, way in zip(rung, ways, strict=True)))
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
            status, said, _ = await pods.b.ring(run, await pods.hint(run, way))  # type: ignore[arg-type]
            assert status == 503
            assert '"not_holder"' in said
            assert pods.a.address in said
        stale = Hint(first.holder, first.epoch - 1, "lost")
        assert (await pods.b.ring(run, stale))[0] == 503, "the gateway speaks of an earlier claim"
        _, _, frames = await pods.b.ring(run, await pods.hint(run, "lost"))
        assert committed(frames) == [3]
        assert await pods.holder(run) == pods.b.address
        await pods.accept(run, [4])
        status, said, _ = await pods.a.ring(run, await pods.hint(run, "service"))
        assert status == 503, "it sees from the bell that it was taken over"
        assert pods.b.address in said

    asyncio.run(story())


def test_a_holder_that_slept_through_a_takeover_writes_nothing_that_counts(
    pods: Two, calm: tuple[str, list[bytes]]
) -> None:
    """SIGSTOP in the middle of its work, at ten places; SIGCONT when the other has done it all."""

    async def story(place: int) -> None:
        run = await pods.make(f"zombie{place}")
        await pods.a.ring(run, Hint())
        await pods.accept(run, range(1, LAST))
        sleeping = asyncio.create_task(pods.a.ring(run, await pods.hint(run, "direct")))
        await asyncio.sleep(0.002 * place)
        pods.a.send(signal.SIGSTOP)
        try:
            await pods.accept_save(run, LAST)
            await pods.b.ring(run, await pods.hint(run, "lost"))
            await expect_calm(pods, run, calm)
            before = await pods.store.list(names.commits(run)), await pods.store.list(names.manifests(run))
        finally:
            pods.a.send(signal.SIGCONT)
        await asyncio.gather(sleeping, return_exceptions=True)
        status, said, _ = await pods.a.ring(run, await pods.hint(run, "service"))
        assert status == 503
        assert pods.b.address in said
        assert (await pods.store.list(names.commits(run)), await pods.store.list(names.manifests(run))) == before
        await expect_calm(pods, run, calm)

    for place in range(10):
        asyncio.run(story(place))
