"""What a gateway remembers of answers: what it was pushed, what it knows without asking, and what it lets go."""

import asyncio

import pytest

from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.records import Commit, Result, encode
from knapper.state.journal.results import GONE, Results
from knapper.store.memory import MemoryStore
from tests.sim.history import RUN

OTHER = RunId(f"{RUN}0")


def commit(*seqs: int, body: bytes = b"") -> Commit:
    results = [Result(seq=seq, sha256=b"", content_type="application/json", body=body or b"%d" % seq) for seq in seqs]
    return Commit(epoch=1, results=results)


async def stored(*commits: Commit) -> MemoryStore:
    store = MemoryStore()
    for n, each in enumerate(commits, 1):
        await store.put_if_absent(layout.commit(RUN, n), encode(each))
    return store


def test_what_is_pushed_is_known_without_looking() -> None:
    results = Results(MemoryStore())
    assert (results.known(RUN, 0), results.applied(RUN), results.complete(RUN)) == (None, -1, False)
    results.offer(RUN, 2, commit(0, 1))
    result = results.known(RUN, 1)
    assert result is not None
    assert (result.seq, result.body) == (1, b"1")
    assert (results.known(RUN, 2), results.applied(RUN), results.applied(OTHER)) == (None, 1, -1)
    results.offer(RUN, 1, commit())
    assert results.applied(RUN) == 1


def test_it_is_complete_once_all_was_read_that_anybody_told_of() -> None:
    async def scenario() -> None:
        results = Results(await stored(commit(), commit(0), commit(1)))
        assert not results.complete(RUN)
        assert await results.find(RUN, 1) is not None
        assert results.complete(RUN)
        results.announce(RUN, 3)
        assert results.complete(RUN)
        results.announce(RUN, 4)
        assert not results.complete(RUN)
        results.announce(RUN, 2)
        assert not results.complete(RUN), "what was heard before stays heard"
        results.offer(RUN, 4, commit(2))
        assert results.complete(RUN)
        results.offer(RUN, 6, commit(4))
        assert not results.complete(RUN), "the one between is missing"
        assert results.applied(RUN) == 4

    asyncio.run(scenario())


def test_a_run_that_nobody_claimed_is_read_from_its_beginning() -> None:
    async def scenario() -> None:
        results = Results(store := MemoryStore())
        assert await results.find(RUN, 0) is None
        assert results.complete(RUN)
        for n, each in enumerate((commit(), commit(0), commit(1, 2)), 1):
            await store.put_if_absent(layout.commit(RUN, n), encode(each))
        for seq in (0, 1, 2):
            result = await results.find(RUN, seq)
            assert result is not None
            assert result.body == b"%d" % seq
        results.announce(RUN, 3)
        assert await results.find(RUN, 3) is None
        assert results.complete(RUN), "a search without a result forgets nothing"

    asyncio.run(scenario())


def test_fences_after_collected_records_are_all_there_is_to_read() -> None:
    async def scenario() -> None:
        store = await stored(commit(0), commit(), commit())
        await store.delete(layout.commit(RUN, 1))
        results = Results(store)
        assert await results.find(RUN, 0) is None
        assert results.complete(RUN)

    asyncio.run(scenario())


def test_an_answer_that_was_swept_says_that_it_is_gone() -> None:
    async def scenario() -> None:
        store = await stored(commit(0), commit(1), commit(2))
        await store.delete(layout.commit(RUN, 1))
        result = await Results(store).find(RUN, 0)
        assert result is not None
        assert (result.seq, result.body, result.failed, result.content_type) == (0, GONE, True, "application/json")
        assert b'"category":"user"' in GONE

    asyncio.run(scenario())


def test_what_is_forgotten_is_read_again_and_what_was_kept_is_given_back() -> None:
    async def scenario() -> None:
        results = Results(await stored(commit(0), commit(1, 2)))
        results.offer(OTHER, 1, commit(0))
        alone = results._commits.size
        await results.find(RUN, 0)
        await results.find(RUN, 2)
        assert results._commits.size == alone + (200 + 201) + (200 + 201 + 201), (
            "200 a commit, 200 a result, and the bodies"
        )
        results.forget(RUN)
        assert (results._commits.size, results.known(RUN, 2), results.applied(RUN)) == (alone, None, -1)
        results.forget(RUN)
        assert results.known(OTHER, 0) is not None
        result = await results.find(RUN, 2)
        assert result is not None
        assert result.body == b"2"

    asyncio.run(scenario())


def test_the_oldest_answers_go_first_when_there_are_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knapper.state.journal.results._CACHE_BYTES_MAX", 3 * 500)
    results = Results(MemoryStore())
    for n in range(1, 4):
        results.offer(RUN, n, commit(n, body=b"x" * 100))
    assert results._commits.size == 1500
    assert results.known(RUN, 1) is not None, "asked for: now it is the newest"
    results.offer(RUN, 4, commit(4, body=b"x" * 100))
    assert results._commits.size == 1500
    assert [seq for seq in range(1, 5) if results.known(RUN, seq) is not None] == [1, 3, 4]
    results.offer(RUN, 5, commit(5, body=b"x" * 5000))
    assert [seq for seq in range(1, 6) if results.known(RUN, seq) is not None] == [1, 3, 4], "5 alone is too large"
    results.offer(RUN, 4, commit(4, body=b"x" * 100))
    assert results._commits.size == 1500, "the same again is not counted twice"


def test_what_was_let_go_is_read_from_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knapper.state.journal.results._CACHE_BYTES_MAX", 500)

    async def scenario() -> None:
        results = Results(await stored(commit(0), commit(1), commit(2)))
        for _ in range(2):
            for seq in (2, 0, 1):
                result = await results.find(RUN, seq)
                assert result is not None
                assert result.body == b"%d" % seq

    asyncio.run(scenario())


@pytest.mark.parametrize("fences", [1, 2, 5])
def test_an_answer_in_the_first_record_of_all_is_found_behind_fences(fences: int) -> None:
    async def scenario() -> None:
        results = Results(await stored(commit(0), *[commit()] * fences))
        result = await results.find(RUN, 0)
        assert result is not None
        assert result.body == b"0"

    asyncio.run(scenario())


def test_who_is_a_little_behind_reads_what_came_and_who_is_far_behind_begins_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("knapper.state.journal.results._BEHIND_MAX", 10)

    async def scenario() -> None:
        store = await stored(*[commit(seq) for seq in range(30)])
        results = Results(store)
        await results.find(RUN, 29)
        for first, last, read in ((30, 40, True), (40, 51, False)):
            for seq in range(first, last):
                await store.put_if_absent(layout.commit(RUN, seq + 1), encode(commit(seq)))
            assert await results.find(RUN, last - 1) is not None
            assert (results.known(RUN, first) is not None) is read
            assert await results.find(RUN, first) is not None

    asyncio.run(scenario())
