"""What is accepted, what is a repetition, and what becomes of numbers that never came: at the limits, and one past."""

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

import msgspec
import pytest

from knapper import limits
from knapper.errors import Corrupt, InvalidField, NotFound, UserError
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal import accept, ends
from knapper.state.journal.accept import Acceptor, PackedBody, decode_creation, newest_manifest, pack
from knapper.state.journal.newest import Manifests
from knapper.state.journal.records import End, Manifest, Operation, decode, encode
from knapper.store.memory import MemoryStore
from knapper.wire import zstd
from tests.sim.history import CREATION, RUN, TERMS


class Bench:
    """A store, a clock that the test sets, and an acceptor over both."""

    def __init__(self) -> None:
        self.store, self.now = MemoryStore(), 1000.0
        self.acceptor = Acceptor(self.store, lambda: self.now)

    async def stored(self, seq: int) -> Operation | None:
        data = await self.store.get(layout.operation(RUN, seq))
        return None if data is None else decode(data, Operation, "in")

    async def claimed(self, n: int, snapshot_seq: int) -> None:
        manifest = Manifest(
            epoch=n, holder="h", address="", claimed_at=0.0, terms=TERMS, snapshot="s", snapshot_seq=snapshot_seq
        )
        assert await self.store.put_if_absent(layout.manifest(RUN, n), encode(manifest))


def story(scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def tell() -> None:
        bench = Bench()
        await bench.acceptor.create(CREATION, b"create")
        await scenario(bench)

    asyncio.run(tell())


def test_a_repetition_is_told_by_what_the_client_sent_where_that_is_stored_in_another_encoding() -> None:
    async def scenario(bench: Bench) -> None:
        body = pack(b"protobuf")
        sent, other = (replace(body, asked_sha256=hashlib.sha256(json).digest()) for json in (b"{}", b'{"a": 1}'))
        assert await bench.acceptor.accept(RUN, 1, "forward_backward", sent) == 1000.0
        assert await bench.acceptor.accept(RUN, 1, "forward_backward", sent) is None
        with pytest.raises(UserError, match=r"seq_id 1 of .* was used before"):
            await bench.acceptor.accept(RUN, 1, "forward_backward", other)

    story(scenario)


def test_what_is_stored_is_what_came_with_its_hash_and_its_time() -> None:
    async def scenario(bench: Bench) -> None:
        bench.now = 1234.5
        assert await bench.acceptor.accept(RUN, 3, "optim_step", pack(b"body")) == 1234.5
        stored = await bench.stored(3)
        assert stored is not None
        assert (stored.run, stored.seq, stored.kind, stored.accepted_at, stored.error) == (
            RUN,
            3,
            "optim_step",
            1234.5,
            "",
        )
        assert stored.sha256 == hashlib.sha256(b"body").digest()
        assert zstd.decompress(stored.body_zstd, 100) == b"body"

    story(scenario)


def test_a_large_record_is_encoded_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """All requests share it. A small one is not worth a thread."""
    threads: list[int] = []

    def noted(record: Operation) -> bytes:
        threads.append(threading.get_ident())
        return encode(record)

    monkeypatch.setattr(accept, "encode", noted)

    async def scenario(bench: Bench) -> None:
        threads.clear()
        loop = threading.get_ident()
        for seq, (body, beside) in enumerate([(256 * 1024, False), (256 * 1024 + 1, True), (1000, False)], start=1):
            await bench.acceptor.accept(RUN, seq, "forward_backward", PackedBody(b"hash", bytes(body)))
            assert (threads[-1] != loop) == beside, body

    story(scenario)


def test_a_repetition_is_told_by_its_body_and_changes_nothing() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.acceptor.accept(RUN, 1, "optim_step", pack(b"a")) == 1000.0
        before = await bench.stored(1)
        bench.now = 2000.0
        assert await bench.acceptor.accept(RUN, 1, "optim_step", pack(b"a")) is None
        with pytest.raises(UserError, match=r"seq_id 1 of .* was used before, for another request \(optim_step\)"):
            await bench.acceptor.accept(RUN, 1, "optim_step", pack(b"b"))
        assert await bench.stored(1) == before

    story(scenario)


def test_a_run_is_made_once_and_by_one_request() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.acceptor.create(CREATION, b"create")
        with pytest.raises(UserError, match=r"seq_id 0 .*another request \(create\)"):
            await bench.acceptor.create(CREATION, b"another")
        assert await bench.acceptor.creation(RUN) == CREATION
        stored = await bench.stored(0)
        assert stored is not None
        assert (stored.kind, stored.sha256) == ("create", hashlib.sha256(b"create").digest())
        assert decode_creation(stored) == CREATION
        assert await bench.acceptor.creation(RunId(f"{RUN}1")) is None

    story(scenario)


def test_a_run_that_has_ended_is_not_made_again() -> None:
    async def scenario(bench: Bench) -> None:
        await ends.end(bench.store, RUN, End(reason="deleted", tenant="local", at=0.0))
        await bench.store.delete(layout.operation(RUN, 0))
        with pytest.raises(NotFound, match="was deleted on 1970-01-01 00:00 UTC; create another"):
            await bench.acceptor.create(CREATION, b"create")
        assert await bench.stored(0) is None

    story(scenario)


@pytest.mark.parametrize("seq", [1, 2, 10**18 - 1])
def test_numbers_are_taken_in_any_order_from_1_to_18_digits(seq: int) -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.acceptor.accept(RUN, seq, "optim_step", pack(b"a")) == 1000.0
        assert await bench.stored(seq) is not None

    story(scenario)


@pytest.mark.parametrize("seq", [0, -1, 10**18])
def test_no_other_number_is_taken(seq: int) -> None:
    async def scenario(bench: Bench) -> None:
        with pytest.raises(InvalidField, match=rf"^seq_id is {seq}; allowed: 1, 2, 3"):
            await bench.acceptor.accept(RUN, seq, "optim_step", pack(b"a"))

    story(scenario)


def test_what_is_in_a_snapshot_and_swept_is_never_accepted_anew() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.claimed(1, snapshot_seq=5)
        for seq in (1, 5):
            with pytest.raises(UserError, match=rf"seq_id {seq} of .* was applied long ago and its record is gone"):
                await bench.acceptor.accept(RUN, seq, "optim_step", pack(b"a"))
            assert await bench.stored(seq) is None
        assert await bench.acceptor.accept(RUN, 6, "optim_step", pack(b"a")) == 1000.0

    story(scenario)


def test_what_is_in_a_snapshot_and_still_there_is_a_repetition() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.acceptor.accept(RUN, 5, "optim_step", pack(b"a"))
        await bench.claimed(1, snapshot_seq=5)
        assert await Acceptor(bench.store, lambda: 0.0).accept(RUN, 5, "optim_step", pack(b"a")) is None

    story(scenario)


def test_how_far_the_newest_snapshot_goes_is_asked_once_an_hour() -> None:
    async def scenario(bench: Bench) -> None:
        assert (
            await bench.acceptor.accept(RUN, 1, "optim_step", pack(b"a")) == 1000.0
        )  # no manifest: nothing is consumed
        await bench.claimed(1, snapshot_seq=5)
        bench.now = 1000.0 + 3599.0
        assert await bench.acceptor.accept(RUN, 4, "optim_step", pack(b"a")) == bench.now, "as it was an hour ago"
        bench.now = 1000.0 + 3600.0
        with pytest.raises(UserError, match="applied long ago"):
            await bench.acceptor.accept(RUN, 3, "optim_step", pack(b"a"))

    story(scenario)


def test_a_rejected_request_uses_its_number_up_with_its_error() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.acceptor.reject(RUN, 2, pack(b"wrong"), "colour is red")
        stored = await bench.stored(2)
        assert stored is not None
        assert (stored.kind, stored.error, stored.sha256) == ("tombstone", "colour is red", pack(b"wrong").sha256)
        assert await bench.acceptor.accept(RUN, 2, "optim_step", pack(b"late")) is None, "its answer is the error"
        assert await bench.stored(2) == stored

    story(scenario)


async def waiting(bench: Bench, *seqs: int) -> None:
    for seq in seqs:
        await bench.acceptor.accept(RUN, seq, "optim_step", pack(b"a"))


@pytest.mark.parametrize(
    ("after_s", "finished", "filled"),
    [
        (limits.sequence_gap_s - 1, False, []), (limits.sequence_gap_s, False, [1, 2, 4]),
        (limits.sequence_gap_s + 1, False, [1, 2, 4]),
        (0.0, True, [1, 2, 4]),
    ],
)  # fmt: skip
def test_gaps_are_filled_once_what_follows_them_is_old_or_nobody_sends_any_more(
    after_s: float, finished: bool, filled: list[int]
) -> None:
    async def scenario(bench: Bench) -> None:
        await waiting(bench, 3, 5)
        bench.now += after_s
        assert await bench.acceptor.fill_gaps(RUN, 0, finished) == filled
        for seq in filled:
            stored = await bench.stored(seq)
            assert stored is not None
            assert (stored.kind, stored.sha256, stored.accepted_at) == ("tombstone", b"", bench.now)
            assert zstd.decompress(stored.body_zstd, 10) == b""
            assert stored.error.startswith(f"operation {seq} of {RUN} never arrived")
        assert await bench.acceptor.fill_gaps(RUN, 0, finished) == []

    story(scenario)


@pytest.mark.parametrize(("applied", "filled"), [(-1, [1, 2, 4]), (0, [1, 2, 4]), (3, [4]), (4, []), (5, [])])
def test_gaps_are_looked_for_behind_what_was_applied(applied: int, filled: list[int]) -> None:
    async def scenario(bench: Bench) -> None:
        await waiting(bench, 3, 5)
        assert await bench.acceptor.fill_gaps(RUN, applied, finished=True) == filled

    story(scenario)


def test_what_is_collected_while_gaps_are_looked_for_is_said() -> None:
    class Collected(MemoryStore):
        async def get(self, name: str) -> bytes | None:
            return None if name == layout.operation(RUN, 3) else await super().get(name)

    async def scenario() -> None:
        store = Collected()
        acceptor = Acceptor(store, lambda: 0.0)
        await acceptor.accept(RUN, 3, "optim_step", pack(b"a"))
        with pytest.raises(NotFound, match="was collected while it was being read"):
            await acceptor.fill_gaps(RUN, 0, finished=True)

    asyncio.run(scenario())


def sampler_save(number: int | None, **more: object) -> bytes:
    return msgspec.json.encode({"seq_id": 1, **more} | ({} if number is None else {"sampling_session_seq_id": number}))


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        (sampler_save(3), sampler_save(4), True), (sampler_save(3, ttl=1), sampler_save(4, ttl=1), True),
        (sampler_save(3, ttl=1), sampler_save(4, ttl=2), False), (sampler_save(3), sampler_save(None), False),
        (sampler_save(None, path="a"), sampler_save(3, path="a"), False),
    ],
)  # fmt: skip
def test_a_sampler_save_may_come_again_with_another_number_and_with_nothing_else(
    first: bytes, second: bytes, same: bool
) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.acceptor.accept(RUN, 1, "save_weights_for_sampler", pack(first))
        again = bench.acceptor.accept(RUN, 1, "save_weights_for_sampler", pack(second))
        if same:
            assert await again is None
        else:
            with pytest.raises(UserError, match="was used before"):
                await again

    story(scenario)


def test_another_kind_of_save_is_another_request() -> None:
    async def scenario(bench: Bench) -> None:
        await bench.acceptor.accept(RUN, 1, "save_weights", pack(sampler_save(3)))
        with pytest.raises(UserError, match=r"another request \(save_weights\)"):
            await bench.acceptor.accept(RUN, 1, "save_weights_for_sampler", pack(sampler_save(4)))

    story(scenario)


def test_a_damaged_creation_is_refused_by_its_name() -> None:
    wrong = Operation(run=RUN, seq=0, kind="create", sha256=b"", body_zstd=zstd.compress(b"no record"), accepted_at=0.0)
    with pytest.raises(Corrupt, match="is damaged: it is no Creation record"):
        decode_creation(wrong)


def test_the_newest_manifest_is_the_one_of_the_highest_number() -> None:
    async def scenario(bench: Bench) -> None:
        assert await newest_manifest(bench.store, RUN) is None
        for n in (1, 2, 10):
            await bench.claimed(n, snapshot_seq=n)
        found = await newest_manifest(bench.store, RUN)
        assert found is not None
        assert (found[0], found[1].snapshot_seq) == (10, 10)

    story(scenario)


def test_acceptors_may_share_what_is_known_of_manifests() -> None:
    async def scenario(bench: Bench) -> None:
        known = Manifests(bench.store)
        await bench.claimed(1, snapshot_seq=5)
        await known.newest(RUN)
        shared = Acceptor(bench.store, lambda: 0.0, known)
        with pytest.raises(UserError, match="applied long ago"):
            await shared.accept(RUN, 5, "optim_step", pack(b"a"))
        assert known.seen(RUN) is not None

    story(scenario)
