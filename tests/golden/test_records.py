"""What was ever stored can be read for ever, and what is newer is refused in words."""

import asyncio
from typing import Any

import msgspec
import pytest

from knapper.errors import Corrupt, NewerFormat
from knapper.state import layout
from knapper.state.journal import envelope
from knapper.state.journal.accept import Acceptor
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Commit, Record, decode, encode, format_of
from knapper.state.journal.run import Run
from knapper.store.memory import MemoryStore
from tests.golden import records
from tests.sim.history import CREATION, RUN, TERMS
from tests.sim.ledger import LedgerMachine

ADD = "run `python -m tests.golden.records`, and commit what it prints"


@pytest.fixture(scope="module")
def types() -> dict[str, type[Record]]:
    return records.types()


def test_every_type_of_record_has_a_file_of_what_it_is_today(types: dict[str, type[Record]]) -> None:
    for name, kind in types.items():
        files = records.files(name)
        assert files, f"{name} has no golden file: {ADD}"
        today = encode(records.full(kind))
        assert files[-1].read_bytes() == today, f"{name} is stored otherwise than {files[-1].name} shows: {ADD}"


def test_every_file_there_ever_was_can_be_read(types: dict[str, type[Record]]) -> None:
    assert len([*records.FILES.iterdir()]) >= len(types)
    for path in sorted(records.FILES.iterdir()):
        kind = types.get(path.name.partition("-")[0])
        assert kind is not None, f"there is no {path.name} any more: what is stored cannot be read"
        data = path.read_bytes()
        raw = msgspec.msgpack.decode(data)
        raw = raw["record"] if raw["v"] == envelope.FORMAT else raw  # what was written before there were envelopes
        assert raw["v"] <= format_of(kind)
        fields = msgspec.to_builtins(decode(data, kind, path.name), builtin_types=(bytes,))
        for field, value in raw.items():
            if field != "v":
                assert covers(fields[field], value), (
                    f"{path.name}: {field} was {value!r}, and is read as {fields[field]!r}"
                )


def covers(now: Any, then: Any) -> bool:
    """Whether all that was stored then is still there; what came into being since has its default."""
    if isinstance(then, dict):
        return all(key in now and covers(now[key], value) for key, value in then.items())
    if isinstance(then, list):
        return len(now) == len(then) and all(map(covers, now, then))
    return bool(now == then)


def test_a_newer_format_is_refused_in_words_whatever_it_looks_like(types: dict[str, type[Record]]) -> None:
    for name, kind in types.items():
        newest = format_of(kind)
        todays = msgspec.msgpack.decode(msgspec.msgpack.encode(records.full(kind)))
        for future in ({**todays, "v": newest + 1}, {**todays, "v": newest + 1, "unheard_of": 1}, {"v": newest + 1}):
            with pytest.raises(NewerFormat, match=f"object x has format {newest + 1} of {name}; .* run the newer one"):
                decode(envelope.seal(name, msgspec.msgpack.encode(future)), kind, "x")
        with pytest.raises(NewerFormat, match=f"object x has format 4 of {name}; .* run the newer one"):
            decode(msgspec.msgpack.encode({"v": 4, "unheard_of": 1}), kind, "x")


def test_a_knapper_of_before_envelopes_says_that_a_newer_one_wrote_them(types: dict[str, type[Record]]) -> None:
    """All that it looked at: first the whole record, and if that failed, the number of its format."""

    class Then(msgspec.Struct):
        v: int

    for kind in types.values():
        data = encode(records.full(kind))
        with pytest.raises(msgspec.DecodeError):
            msgspec.msgpack.decode(data, type=kind)
        assert msgspec.msgpack.decode(data, type=Then).v > envelope.BARE_MAX


def test_a_record_without_an_envelope_is_of_a_format_that_had_none(types: dict[str, type[Record]]) -> None:
    for kind in types.values():
        content = msgspec.msgpack.decode(msgspec.msgpack.encode(records.full(kind)))
        for v in (-1, 0, envelope.FORMAT):
            with pytest.raises(Corrupt, match="object x is damaged"):
                decode(msgspec.msgpack.encode({**content, "v": v}), kind, "x")


def test_an_unknown_field_in_a_known_format_is_damage() -> None:
    data = msgspec.msgpack.encode({"v": 1, "epoch": 1, "results": [], "unheard_of": 1})
    with pytest.raises(Corrupt, match="unheard_of"):
        decode(data, Commit, "x")
    with pytest.raises(Corrupt, match="it is no Commit record"):
        decode(b"\xc1", Commit, "x")


def test_a_run_with_records_of_the_future_waits_for_the_newer_program() -> None:
    async def story() -> None:

        store = MemoryStore()
        await Acceptor(store, lambda: 0.0).create(CREATION, b"create")
        future = msgspec.msgpack.encode(Commit(epoch=1, results=[], v=3))
        await store.put_if_absent(layout.commit(RUN, 1), envelope.seal("Commit", future))
        with pytest.raises(NewerFormat, match="has format 3 of Commit; this knapper reads up to format 2"):
            await Run.claim(store, RUN, LedgerMachine(), Holder("h", "", TERMS), lambda: 0.0)

    asyncio.run(story())
