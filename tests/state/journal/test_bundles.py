"""Bundles exist whole or not at all, and what is read of them is what was written."""

import asyncio
import hashlib

import pytest

from knapper.errors import Corrupt
from knapper.state.journal import bundles
from knapper.state.journal.records import Index, Part
from knapper.store.memory import MemoryStore
from tests.sim.history import SPEC

FILES = {"a.bin": b"first", "b.bin": b"", "c.bin": bytes(range(256)) * 10}
AT = "snap/1/"


async def written() -> MemoryStore:
    store = MemoryStore()
    await bundles.write(store, AT, FILES, spec=SPEC, seq=7, epoch=3)
    return store


def test_the_index_says_whose_it_is_and_each_file_s_size_and_hash() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        index = await bundles.write(store, AT, FILES, spec=SPEC, seq=7, epoch=3, step=5)
        parts = [Part(name=name, size=len(data), sha256=hashlib.sha256(data).digest()) for name, data in FILES.items()]
        assert index == Index(spec=SPEC, seq=7, epoch=3, parts=parts, step=5)
        assert await bundles.read_index(store, AT) == index
        assert await store.list("") == [f"{AT}{name}" for name in (*FILES, "index")]
        again = await bundles.write(store, AT, FILES, spec=SPEC, seq=7, epoch=3, step=5)
        assert again == index, "writing it again is harmless"

    asyncio.run(scenario())


def test_all_files_are_read_or_those_that_are_asked_for() -> None:
    async def scenario() -> None:
        store = await written()
        index, files = await bundles.read(store, AT)
        assert files == FILES
        assert (await bundles.read(store, AT, frozenset({"c.bin", "none"})))[1] == {"c.bin": FILES["c.bin"]}
        assert (await bundles.read(store, AT, frozenset()))[1] == {}
        for name, data in FILES.items():
            assert await bundles.read_part(store, AT, index, name) == data
        with pytest.raises(Corrupt, match=f"bundle {AT} has no file none"):
            await bundles.read_part(store, AT, index, "none")

    asyncio.run(scenario())


def test_without_its_index_a_bundle_is_not_there() -> None:
    async def scenario() -> None:
        store = await written()
        await store.delete(f"{AT}index")
        assert await bundles.read_index(store, AT) is None
        with pytest.raises(Corrupt, match="has no index: it was never finished, or was deleted"):
            await bundles.read(store, AT)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (None, "missing;"),
        (b"firsu", "5 bytes that are others"),
        (b"firs", "4 bytes that are others"),
        (b"first!", "6 bytes"),
    ],
)
def test_a_file_that_is_not_what_the_index_says_is_refused_by_name(stored: bytes | None, said: str) -> None:
    async def scenario() -> None:
        store = await written()
        await store.delete(f"{AT}a.bin")
        if stored is not None:
            await store.put_if_absent(f"{AT}a.bin", stored)
        with pytest.raises(
            Corrupt, match=rf"object {AT}a.bin is damaged: it is {said}.*its index says 5 bytes of a known hash"
        ):
            await bundles.read(store, AT)

    asyncio.run(scenario())


def test_a_deleted_bundle_leaves_nothing_and_loses_its_index_first() -> None:
    class Noting(MemoryStore):
        deleted: list[str] = []

        async def delete(self, name: str) -> None:
            self.deleted.append(name)
            await super().delete(name)

    async def scenario() -> None:
        store = Noting()
        store.deleted = []
        await bundles.write(store, AT, FILES, spec=SPEC, seq=7, epoch=3)
        await store.put_if_absent("snap/10/a", b"another bundle's")
        await bundles.delete(store, AT)
        assert store.deleted[0] == f"{AT}index"
        assert await store.list("") == ["snap/10/a"]

    asyncio.run(scenario())
