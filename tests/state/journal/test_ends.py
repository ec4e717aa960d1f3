"""The end of a run: its record, which stays, and the fence that stops the holder."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from knapper.state import layout
from knapper.state.journal import ends
from knapper.state.journal.records import Commit, End, decode, encode
from knapper.store.memory import MemoryStore
from tests.sim.history import RUN

FINISHED = End(reason="finished", tenant="alice", at=10.0, asked_at=5.0)
DELETED = End(reason="deleted", tenant="alice", at=20.0)


def story(scenario: Callable[[MemoryStore], Awaitable[None]]) -> None:
    asyncio.run(scenario(MemoryStore()))  # type: ignore[arg-type]  # it is a coroutine


async def listed(store: MemoryStore, prefix: str) -> list[int]:
    return [layout.last_number(name) for name in await store.list(prefix)]


async def fenced(store: MemoryStore) -> Commit:
    newest = (await store.list(layout.commits(RUN)))[-1]
    return decode(await store.get(newest) or b"", Commit, newest)


def test_a_run_that_goes_on_has_no_end_and_one_that_ended_says_how() -> None:
    async def scenario(store: MemoryStore) -> None:
        assert await ends.ended(store, RUN) is None
        assert await ends.end(store, RUN, FINISHED) == FINISHED
        assert await ends.ended(store, RUN) == FINISHED
        assert await listed(store, layout.ends(RUN)) == [1]

    story(scenario)


def test_what_is_finished_can_be_deleted_and_what_is_deleted_stays_so() -> None:
    async def scenario(store: MemoryStore) -> None:
        await ends.end(store, RUN, FINISHED)
        assert await ends.end(store, RUN, End(reason="finished", tenant="alice", at=11.0)) == FINISHED
        assert await ends.end(store, RUN, DELETED) == DELETED
        assert await ends.end(store, RUN, FINISHED) == DELETED
        assert await ends.end(store, RUN, End(reason="deleted", tenant="operator", at=30.0)) == DELETED
        assert await ends.ended(store, RUN) == DELETED
        assert await listed(store, layout.ends(RUN)) == [1, 2]

    story(scenario)


@pytest.mark.parametrize("commits", [0, 1, 3])
def test_the_fence_takes_the_slot_after_the_last_commit_and_is_put_once(commits: int) -> None:
    async def scenario(store: MemoryStore) -> None:
        for n in range(1, commits + 1):
            await store.put_if_absent(layout.commit(RUN, n), encode(Commit(epoch=n, results=[])))
        for _ in range(2):
            await ends.end(store, RUN, FINISHED)
            assert await listed(store, layout.commits(RUN)) == list(range(1, commits + 2))
        fence = await fenced(store)
        assert (fence.epoch, fence.results) == (2**62, [])

    story(scenario)


def test_who_commits_beside_the_fence_is_passed_and_who_fenced_meanwhile_is_enough() -> None:
    class Beside(MemoryStore):
        """Somebody takes the slots 1 to `others` at the moment that the fence looks for one."""

        others: list[bytes] = []

        async def put_if_absent(self, name: str, data: bytes) -> bool:
            if name.startswith(layout.commits(RUN)):
                others, self.others = self.others, []
                for n, other in enumerate(others, 1):
                    await super().put_if_absent(layout.commit(RUN, n), other)
            return await super().put_if_absent(name, data)

    async def scenario() -> None:
        late = encode(Commit(epoch=7, results=[]))
        store = Beside()
        store.others = [late, late, late]
        await ends.fence(store, RUN)
        assert await listed(store, layout.commits(RUN)) == [1, 2, 3, 4]
        assert (await fenced(store)).epoch == 2**62
        fence = await store.get(layout.commit(RUN, 4))
        assert fence is not None
        again = Beside()
        again.others = [late, fence]
        await ends.fence(again, RUN)
        assert await listed(again, layout.commits(RUN)) == [1, 2]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (DELETED, "was deleted on 1970-01-01 00:00 UTC; create another with create_lora_training_client"),
        (FINISHED, "is over: its session had ended, and its state was deleted on 1970-01-01 00:00 UTC"),
        (End(reason="deleted", tenant="a", at=86400.0 * 365 + 3660), "was deleted on 1971-01-01 01:01 UTC"),
    ],
)
def test_its_tenant_is_told_when_and_what_to_do(end: End, said: str) -> None:
    assert said in str(ends.refusal(RUN, end))
    assert str(ends.refusal(RUN, end)).startswith(f"training run {RUN} ")
