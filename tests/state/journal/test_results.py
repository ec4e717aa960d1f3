"""A first search finds every result, whatever the newest record is; the cache is bounded."""

import asyncio
import json

import pytest

from knapper.errors import Corrupt, UserError
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, Result, encode
from knapper.state.journal.results import Results
from knapper.state.journal.run import Run
from knapper.store.memory import MemoryStore
from tests.gateway.hours import CountingStore
from tests.sim.history import CREATION, RUN, TERMS, Step, send
from tests.sim.ledger import LedgerMachine


async def nothing(_n: int, _commit: Commit) -> None:
    return None


def test_an_answer_behind_the_fences_of_later_claims_is_found() -> None:
    """A gateway and a train_step that both died: the run is claimed before the new gateway first looks."""

    async def story() -> None:
        store = MemoryStore()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        await send(acceptor, Step(1, "optim_step", b"{}"))
        fenced = Results(store)
        run = await Run.claim(store, RUN, LedgerMachine(), Holder("h0", "", TERMS), lambda: 0.0)
        assert await fenced.find(RUN, 0) is None
        assert not await run.apply_pending(lambda: False, nothing)
        for n in range(3):
            await Run.claim(store, RUN, LedgerMachine(), Holder(f"h{n + 1}", "", TERMS), lambda: 0.0)
        results = Results(store)
        assert await results.find(RUN, 1) is not None
        assert results.applied(RUN) == 1
        assert await results.find(RUN, 2) is None
        assert await fenced.find(RUN, 1) is not None

    asyncio.run(story())


def test_a_retried_sampler_save_with_the_sdk_s_next_number_is_the_same_save() -> None:
    async def story() -> None:
        acceptor = Acceptor(MemoryStore(), lambda: 0.0)
        await acceptor.create(CREATION, b"create")
        for number in (3, 4):
            body = b'{"seq_id":1,"sampling_session_seq_id":%d}' % number
            await send(acceptor, Step(1, "save_weights_for_sampler", body))
        with pytest.raises(UserError, match="was used before"):
            await send(acceptor, Step(1, "save_weights_for_sampler", b'{"seq_id":1,"path":"a"}'))

    asyncio.run(story())


def commit(*seqs: int, body: bytes = b"", device_s: float = 0.0) -> Commit:
    """The answer to operation 7 is `7`, unless told otherwise."""
    results = [Result(seq=seq, sha256=b"", content_type="application/json", body=body or b"%d" % seq) for seq in seqs]
    return Commit(epoch=1, results=results, device_s=device_s)


async def lay(store: MemoryStore, *numbers: int) -> None:
    for n in numbers:
        await store.put_if_absent(layout.commit(RUN, n), encode(commit(n)))


async def body(results: Results, seq: int) -> bytes | None:
    result = await results.find(RUN, seq)
    return None if result is None else result.body


@pytest.mark.parametrize("last", [1, 2, 9, 24])
def test_a_damaged_record_hides_its_own_answer_and_no_other(last: int) -> None:
    async def story(damaged: int) -> None:
        store = MemoryStore()
        await lay(store, *(n for n in range(1, last + 1) if n != damaged))
        await store.put_if_absent(layout.commit(RUN, damaged), b"\xc1")
        for seq in range(1, last + 1):
            results = Results(store)  # one that begins at the end, and searches
            if seq == damaged:
                with pytest.raises(Corrupt, match=layout.commit(RUN, damaged)):
                    await results.find(RUN, seq)
            else:
                assert await body(results, seq) == b"%d" % seq
        results = Results(store)
        if damaged < last:
            assert await results.find(RUN, last + 1) is None, "what comes after the newest is only not there yet"
        with pytest.raises(Corrupt):
            await results.find(RUN, damaged)
        await store.delete(layout.commit(RUN, damaged))
        await lay(store, damaged)  # from a backup
        assert [await body(results, seq) for seq in range(1, last + 1)] == [b"%d" % n for n in range(1, last + 1)]

    for damaged in range(1, last + 1):
        asyncio.run(story(damaged))


def test_what_is_known_costs_no_call_and_is_complete_until_more_is_told() -> None:
    async def story() -> None:
        memory = MemoryStore()
        store = CountingStore(memory)
        results = Results(store)
        assert (results.applied(RUN), results.complete(RUN), results.known(RUN, 1)) == (-1, False, None)
        results.announce(RUN, 0)
        assert not results.complete(RUN), "nothing was read yet"
        assert await body(results, 1) is None
        assert (results.applied(RUN), results.complete(RUN)) == (-1, True)
        await lay(memory, 1, 2, 3)
        results.announce(RUN, 3)
        assert not results.complete(RUN)
        assert await body(results, 3) == b"3"
        assert (results.applied(RUN), results.complete(RUN)) == (3, True)
        store.calls.clear()
        assert [await body(results, seq) for seq in (1, 2, 3)] == [b"1", b"2", b"3"]
        assert store.calls == {}

        results.announce(RUN, 5)
        results.announce(RUN, 2)  # late: it takes nothing back
        assert not results.complete(RUN)
        results.offer(RUN, 4, commit(4))
        assert (results.applied(RUN), results.complete(RUN)) == (4, False)
        results.offer(RUN, 5, commit(5))
        assert (results.applied(RUN), results.complete(RUN)) == (5, True)
        assert [await body(results, seq) for seq in (4, 5)] == [b"4", b"5"]
        assert store.calls == {}, "the holder pushed them"

        results.offer(RUN, 7, commit(7))  # the sixth was lost on its way
        assert not results.complete(RUN)
        await lay(memory, 4, 5, 6, 7)
        assert [await body(results, seq) for seq in (6, 7)] == [b"6", b"7"]
        assert results.complete(RUN)

    asyncio.run(story())


def test_the_first_of_those_that_were_committed_together_has_the_seconds_of_all() -> None:
    async def story() -> None:
        store = MemoryStore()
        await store.put_if_absent(layout.commit(RUN, 1), encode(commit(0, 1, device_s=0.5)))
        await store.put_if_absent(layout.commit(RUN, 2), encode(commit(2, 3, 4, device_s=2.5)))
        results = Results(store)
        assert [await body(results, seq) for seq in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        assert [await results.device_s(RUN, seq) for seq in range(6)] == [0.5, 0.0, 2.5, 0.0, 0.0, 0.0]

    asyncio.run(story())


def test_an_answer_that_is_gone_says_so_as_a_users_error() -> None:
    async def story() -> None:
        store = MemoryStore()
        await lay(store, 5)
        gone = await Results(store).find(RUN, 4)
        assert gone is not None
        assert (gone.seq, gone.failed, gone.content_type, gone.sha256) == (4, True, "application/json", b"")
        body = json.loads(gone.body)
        assert (set(body), body["category"]) == ({"error", "category"}, "user")
        assert body["error"].startswith("the result of this operation is gone")

    asyncio.run(story())


def test_of_the_answers_the_ones_that_were_used_last_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knapper.state.journal.results._CACHE_BYTES_MAX", 9000)  # two of 4000, and what they take
    results = Results(MemoryStore())

    def offer(n: int, size: int = 4000) -> None:
        results.offer(RUN, n, commit(n, body=b"x" * size))

    def known() -> list[int]:
        return [seq for seq in range(1, 8) if results.known(RUN, seq) is not None]

    for n in (1, 2, 3):
        offer(n)
    assert known() == [2, 3]
    assert results.known(RUN, 1) is None
    assert results.known(RUN, 2) is not None  # now the third was used longest ago
    offer(4)
    assert known() == [2, 4]
    offer(4)  # once more: it takes no more room
    assert known() == [2, 4]
    offer(5, 20_000)
    assert known() == [2, 4], "what is larger than all the room is read again instead"
    results.forget(RUN)
    assert (results.known(RUN, 5), results.applied(RUN), results.complete(RUN)) == (None, -1, False)
    for n in (6, 7):
        offer(n)
    assert known() == [6, 7], "what was forgotten has left its room"


def test_runs_do_not_share_what_is_known_or_forgotten() -> None:
    other = RunId("ses-" + "1" * 32 + ":train:0")
    results = Results(MemoryStore())
    results.offer(RUN, 1, commit(1))
    results.offer(other, 1, commit(1, body=b"another"))
    results.forget(RUN)
    results.forget(RUN)
    result = results.known(other, 1)
    assert results.known(RUN, 1) is None
    assert result is not None
    assert result.body == b"another"
