"""Records and where they lie: formats, what is refused of them, and history read newest first."""

import asyncio
import hashlib

import msgspec
import numpy as np
import pytest

from knapper.errors import Corrupt, NewerFormat
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal import envelope, history, records
from knapper.state.journal.records import (
    SAVES,
    Commit,
    Creation,
    Drawn,
    End,
    Index,
    Kind,
    Manifest,
    Operation,
    Provenance,
    Record,
    Result,
    Terms,
    decode,
    encode,
    format_of,
)
from knapper.state.layout import run_prefix
from knapper.store.memory import MemoryStore
from knapper.wire import proto, zstd
from knapper.wire.types import Datum, ForwardBackward
from tests.sim.history import CREATION, RUN, SPEC, TERMS

AT = run_prefix(RUN)
N5, N3 = "00000000000000000005", "00000000000000000003"


def test_where_each_record_of_a_run_lies() -> None:
    assert layout.operation(RUN, 5) == f"{AT}in/{N5}"
    assert layout.commit(RUN, 5) == f"{AT}out/{N5}"
    assert layout.manifest(RUN, 5) == f"{AT}manifest/{N5}"
    assert layout.snapshot(RUN, 5, 3) == f"{AT}snap/{N5}-{N3}/"
    assert layout.ends(RUN) == f"{AT}end/"
    assert layout.parse_bundle(layout.snapshot(RUN, 5, 3)) == (5, 3)
    assert layout.last_number(layout.commit(RUN, 5)) == 5
    for one, many in (
        (layout.operation, layout.operations),
        (layout.commit, layout.commits),
        (layout.manifest, layout.manifests),
    ):
        assert one(RUN, 5) == many(RUN) + N5
    assert layout.snapshot(RUN, 5, 3).startswith(layout.snapshots(RUN))


def test_what_is_encoded_is_decoded() -> None:
    result = Result(seq=1, sha256=b"h", content_type="application/json", body=b"{}", failed=True, source="s")
    commit = Commit(epoch=4, results=[result], committed_at=1.5, device_s=0.25)
    manifest = Manifest(epoch=1, holder="h", address="a", claimed_at=2.0, terms=TERMS)
    for record in (commit, manifest, CREATION, SPEC, TERMS):
        assert decode(encode(record), type(record), "x") == record
    assert (manifest.snapshot, manifest.snapshot_seq, manifest.snapshot_out) == ("", -1, 0)
    assert (manifest.snapshot_before, manifest.snapshot_before_seq, manifest.snapshot_before_out) == ("", -1, 0)
    assert (Creation(spec=SPEC).source, Creation(spec=SPEC).with_optimizer) == ("", False)
    assert (Commit(epoch=1, results=[]).committed_at, Commit(epoch=1, results=[]).device_s) == (0.0, 0.0)
    plain = Result(seq=1, sha256=b"", content_type="application/json", body=b"")
    assert (plain.failed, plain.source) == (False, "")
    assert End(reason="finished", tenant="alice", at=1.0).asked_at == 0.0, "as in ends of releases that did not note it"


def test_no_record_can_be_changed_and_each_is_of_the_newest_format() -> None:
    kinds = [kind for kind in vars(records).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    assert {Operation, Index, Drawn, Provenance} < set(kinds)
    assert [kind.__name__ for kind in kinds if not kind.__struct_config__.frozen] == []
    index = Index(spec=SPEC, seq=1, epoch=1, parts=[])
    assert (index.v, index.step) == (2, -1)
    drawn = Drawn(run=RUN, seq=1, step=3, digest="d", datums=2)
    assert (drawn.sampler, drawn.temperature, drawn.truncated, drawn.overdue) == ("", 1.0, False, 0)
    assert Provenance(loss="ppo", digest=b"d") == Provenance(loss="ppo", digest=b"d", sampled=0, drawn=[])


def test_the_snapshot_before_takes_the_place_of_one_that_cannot_be_read() -> None:
    manifest = Manifest(epoch=1, holder="h", address="a", claimed_at=2.0, terms=TERMS)
    both = manifest.with_snapshot("first/", 3, 5).with_snapshot("second/", 7, 9)
    assert (both.snapshot, both.snapshot_seq, both.snapshot_out) == ("second/", 7, 9)
    assert (both.snapshot_before, both.snapshot_before_seq, both.snapshot_before_out) == ("first/", 3, 5)
    assert both.without_newest_snapshot() == manifest.with_snapshot("first/", 3, 5)
    assert both.without_newest_snapshot().without_newest_snapshot() == manifest


def test_saves_are_the_three_that_store_weights() -> None:
    assert {"save_weights", "save_weights_for_sampler", "save_weights_external"} == SAVES


def pack(fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


@pytest.mark.parametrize(("kind", "format_"), [(Commit, 2), (Operation, 3), (Manifest, 1)])
def test_a_newer_format_is_told_from_damage(kind: type[Record], format_: int) -> None:
    """Within its envelope a record says its own format; without one, only those were written that are as old."""
    assert format_of(kind) == format_
    name = kind.__name__
    message = f"object x has format {{}} of {name}; this knapper reads up to format {{}}: run the newer one"
    for newer, found in (
        (envelope.seal(name, pack({"v": format_ + 1, "unheard_of": 1})), format_ + 1),
        (pack({"v": 4}), 4),
    ):
        with pytest.raises(NewerFormat) as refused:
            decode(newer, kind, "x")
        assert str(refused.value) == message.format(found, format_)
        assert refused.value.retry_after_s == 30.0
    old = {"v": format_, "unheard_of": 1}
    bare = pack({"v": min(format_, envelope.BARE_MAX), "unheard_of": 1})
    for damaged in (envelope.seal(name, pack(old)), bare, pack([1]), b"", b"\xc1", envelope.seal(name, b"\xc1")):
        with pytest.raises(Corrupt, match=rf"object x is damaged: it is no {name} record: (?!its envelope)"):
            decode(damaged, kind, "x")
    with pytest.raises(Corrupt, match=rf"it is no {name} record: its envelope is broken"):
        decode(pack({"v": 3}), kind, "x")


def test_an_envelope_says_kind_and_checksum_and_is_the_same_each_time() -> None:
    inside = pack({"v": 1, "a": "b"})
    whole = envelope.seal("Terms", inside)
    digest = hashlib.sha256(b"3 Terms " + inside).digest()
    assert msgspec.msgpack.decode(whole) == {"v": 3, "kind": "Terms", "sha256": digest, "record": {"v": 1, "a": "b"}}
    assert envelope.seal("Terms", inside) == whole
    assert envelope.unseal(whole, "Terms", "x") == msgspec.Raw(inside)
    assert envelope.unseal(inside, "Terms", "x") is None
    with pytest.raises(Corrupt, match=r"object x is damaged: field kind is 'Terms'; allowed there: 'Spec'"):
        envelope.unseal(whole, "Spec", "x")
    changed = pack({**msgspec.msgpack.decode(whole), "record": {"v": 1, "a": "c"}})
    with pytest.raises(Corrupt, match="field sha256 is not that of its other bytes"):
        envelope.unseal(changed, "Terms", "x")
    later = hashlib.sha256(b"4 Terms " + inside).digest()
    with pytest.raises(NewerFormat, match="object x has format 4 of Terms; this knapper reads up to format 3"):
        envelope.unseal(pack({"v": 4, "kind": "Terms", "sha256": later, "record": msgspec.Raw(inside)}), "Terms", "x")


@pytest.mark.parametrize(("v", "said"), [(0, "field v is 0"), (3, "field v is 3"), (-1, "field v is -1")])
def test_a_record_without_an_envelope_is_of_a_format_that_had_none(v: int, said: str) -> None:
    bare = pack({**msgspec.to_builtins(TERMS), "v": v})
    with pytest.raises(Corrupt, match=f"{said}, and a Terms record of that format has an envelope"):
        decode(bare, Terms, "x")
    assert decode(pack({**msgspec.to_builtins(TERMS), "v": 1}), Terms, "x") == TERMS
    with pytest.raises(NewerFormat, match="has format 2 of Terms; this knapper reads up to format 1"):
        decode(pack({**msgspec.to_builtins(TERMS), "v": 2}), Terms, "x")


def test_a_record_with_a_field_that_nobody_knows_is_damaged() -> None:
    fields = msgspec.to_builtins(TERMS)
    assert decode(envelope.seal("Terms", pack(fields)), Terms, "x") == TERMS
    with pytest.raises(Corrupt, match=r"object x is damaged: it is no Terms record: .*colour"):
        decode(envelope.seal("Terms", pack({**fields, "colour": 1})), Terms, "x")


def test_a_newer_format_with_the_same_fields_is_refused_too() -> None:
    newer = msgspec.structs.replace(Commit(epoch=1, results=[]), v=3)
    with pytest.raises(NewerFormat):
        decode(encode(newer), Commit, "x")
    older = msgspec.structs.replace(newer, v=1)
    assert decode(encode(older), Commit, "x") == older


def test_history_is_read_newest_first_in_groups_without_creation_fences_and_gaps() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        for seq in range(71):
            operation = Operation(
                run=RUN,
                seq=seq,
                kind="create" if seq == 0 else "optim_step",
                sha256=b"",
                body_zstd=b"",
                accepted_at=0.0,
            )
            await store.put_if_absent(layout.operation(RUN, seq), encode(operation))
            result = Result(seq=seq, sha256=b"", content_type="application/json", body=b"")
            commit = Commit(epoch=1, results=[] if seq % 10 == 5 else [result])
            await store.put_if_absent(layout.commit(RUN, seq + 1), encode(commit))
        await store.put_if_absent(layout.operation(RunId(f"{RUN}0"), 1), b"of another run")
        accepted = [[each.seq for each in group] async for group in history.operations(store, RUN)]
        assert accepted == [list(range(70, 38, -1)), list(range(38, 6, -1)), list(range(6, 0, -1))]
        answered = [each.results[0].seq async for group in history.commits(store, RUN) for each in group]
        assert answered == [seq for seq in range(70, -1, -1) if seq % 10 != 5]
        assert [group async for group in history.commits(store, RunId("none"))] == []

    asyncio.run(scenario())


def test_what_is_swept_while_history_is_read_is_left_out() -> None:
    class Swept(MemoryStore):
        async def get(self, name: str) -> bytes | None:
            return None if layout.last_number(name) == 2 else await super().get(name)

    async def scenario() -> None:
        store = Swept()
        for n in (1, 2, 3):
            operation = Operation(run=RUN, seq=n, kind="optim_step", sha256=b"", body_zstd=b"", accepted_at=0.0)
            await store.put_if_absent(layout.operation(RUN, n), encode(operation))
            result = Result(seq=n, sha256=b"", content_type="application/json", body=b"")
            await store.put_if_absent(layout.commit(RUN, n), encode(Commit(epoch=1, results=[result])))
        assert [each.seq async for group in history.operations(store, RUN) for each in group] == [3, 1]
        assert [each.results[0].seq async for group in history.commits(store, RUN) for each in group] == [3, 1]

    asyncio.run(scenario())


def operation(kind: Kind, body: bytes, sha256: bytes, v: int = 2) -> Operation:
    return Operation(v=v, run=RUN, seq=5, kind=kind, sha256=sha256, body_zstd=zstd.compress(body), accepted_at=0.0)


DATUM = Datum(np.array([1, 2], np.int32), {"target_tokens": np.array([2, 3], np.int64)})
PASS = proto.encode_forward_backward(ForwardBackward(RUN, 5, [DATUM], "cross_entropy", {}, False))
OTHERS = hashlib.sha256(b"of what the client sent").digest()


@pytest.mark.parametrize(
    "given",
    [
        operation("optim_step", b"{}", hashlib.sha256(b"{}").digest()),
        operation("forward_backward", PASS, hashlib.sha256(PASS).digest()),
        operation("create", b"a creation, encoded", OTHERS),
        operation("tombstone", b"", b""),
        operation("forward_backward", PASS, OTHERS, v=1),  # it came as JSON, whose hash it has
    ],
    ids=lambda given: f"{given.kind} {given.v}",
)
def test_the_body_is_what_was_accepted(given: Operation) -> None:
    assert given.body() == zstd.decompress(given.body_zstd)
    assert given.request_sha256 == given.sha256
    assert msgspec.structs.replace(given, asked_sha256=b"json").request_sha256 == b"json"


@pytest.mark.parametrize(
    "given",
    [
        operation("optim_step", b"{ }", hashlib.sha256(b"{}").digest()),
        operation("forward_backward", PASS, OTHERS),
        operation("optim_step", PASS, OTHERS, v=1),
        operation("forward_backward", b"{}", OTHERS, v=1),
        operation("forward_backward", PASS + b"\x98\x06\x00", OTHERS, v=1),  # a field that nobody knows
    ],
    ids=["another", "a pass", "a step of format 1", "no pass", "a pass that others wrote"],
)
def test_a_body_that_is_not_what_was_accepted_is_damage(given: Operation) -> None:
    with pytest.raises(Corrupt, match=f"object {layout.operation(RUN, 5)} is damaged: field sha256 is not that of its"):
        given.body()


def test_a_body_that_is_no_zstd_is_damage() -> None:
    whole = operation("optim_step", b"{}", hashlib.sha256(b"{}").digest())
    with pytest.raises(Corrupt, match=f"object {layout.operation(RUN, 5)} is damaged: field body_zstd cannot be"):
        msgspec.structs.replace(whole, body_zstd=b"{}").body()
