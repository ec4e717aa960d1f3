"""What is damaged is not applied, nor answered as if by its user's mistake: the run waits until it is restored."""

import asyncio

import msgspec
import pytest

from knapper.errors import Corrupt
from knapper.state import layout
from knapper.state.journal.accept import Acceptor, pack
from knapper.state.journal.envelope import BARE_MAX
from knapper.state.journal.holder import Holder
from knapper.state.journal.records import Operation, decode, encode
from knapper.state.journal.results import Results
from knapper.state.journal.run import Run
from knapper.store import Store
from knapper.store.memory import MemoryStore
from knapper.wire import zstd
from tests.sim.history import CREATION, RUN, TERMS, digest_of
from tests.sim.ledger import SIZE, LedgerMachine
from tests.state.damage import flips

BODY = bytes(range(4 * SIZE))
NAME = layout.operation(RUN, 1)


async def accepted() -> MemoryStore:
    store = MemoryStore()
    acceptor = Acceptor(store, lambda: 0.0)
    await acceptor.create(CREATION, b"create")
    await acceptor.accept(RUN, 1, "forward_backward", pack(BODY))
    return store


async def applied(store: Store) -> str:
    """The digest of the state after all that waits."""
    run = await Run.claim(store, RUN, LedgerMachine(), Holder("h", "", TERMS), lambda: 0.0)
    while await run.apply_pending(lambda: False, _nothing):
        pass
    return await digest_of(LedgerMachine(), run)


async def _nothing(_n: int, _commit: object) -> None:
    return None


def other_body(data: bytes) -> bytes:
    """A record that is whole, whose body is another than its hash is of."""
    return encode(msgspec.structs.replace(decode(data, Operation, "x"), body_zstd=zstd.compress(BODY[::-1])))


def broken_body(data: bytes) -> bytes:
    return encode(msgspec.structs.replace(decode(data, Operation, "x"), body_zstd=b"no zstd"))


def of_another_run(data: bytes) -> bytes:
    return encode(msgspec.structs.replace(decode(data, Operation, "x"), run=RUN[:-1] + "1"))


def one_bit(data: bytes) -> bytes:
    return flips.flipped(data, 8 * len(data) - 20)


@pytest.mark.parametrize("damage", [other_body, broken_body, of_another_run, one_bit, lambda _data: b""])
def test_a_damaged_operation_is_neither_applied_nor_answered(damage: object) -> None:
    assert callable(damage)

    async def story() -> None:
        truth = await applied(await accepted())
        store = await accepted()
        sound = await store.get(NAME) or b""
        await flips.put(store, NAME, damage(sound))
        with pytest.raises(Corrupt, match=f"object {NAME} is damaged") as raised:
            await applied(store)
        assert "operator" in str(raised.value)
        assert await Results(store).find(RUN, 1) is None
        await flips.put(store, NAME, sound)
        assert await applied(store) == truth

    asyncio.run(story())


def test_a_body_in_a_record_without_an_envelope_is_held_against_its_hash_too() -> None:
    """As they were stored before."""

    async def story() -> None:
        truth = await applied(await accepted())
        store = await accepted()
        newest = decode(await store.get(NAME) or b"", Operation, NAME)
        bare = msgspec.msgpack.encode(msgspec.structs.replace(newest, v=BARE_MAX))
        other = msgspec.msgpack.encode(decode(other_body(bare), Operation, NAME))
        await flips.put(store, NAME, other)
        with pytest.raises(Corrupt, match="field sha256 is not that of its body"):
            await applied(store)
        await flips.put(store, NAME, bare)
        assert await applied(store) == truth

    asyncio.run(story())
