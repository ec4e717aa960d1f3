"""Which objects are a claim's own: those that it created, and those that it may have."""

import asyncio

import pytest

from knapper.errors import Fenced, Unavailable
from knapper.state.journal.own_objects import OwnObjects
from knapper.store.memory import MemoryStore


class LostAnswer(MemoryStore):
    """The first put is stored, and its answer is lost."""

    answers = 0

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        created = await super().put_if_absent(name, data)
        self.answers += 1
        if self.answers == 1:
            raise Unavailable("the connection broke")
        return created


def test_what_an_attempt_may_have_stored_is_its_own() -> None:
    async def story() -> None:
        objects = OwnObjects(LostAnswer())
        with pytest.raises(Unavailable):
            await objects.create("a", b"mine")
        assert await objects.create("a", b"mine") is None
        assert await objects.create("a", b"mine") == b"mine", "from then on it is known: the next equal one is a copy's"

    asyncio.run(story())


def test_equal_bytes_are_a_copy_s_unless_an_attempt_failed() -> None:
    async def story() -> None:
        store = MemoryStore()
        assert await OwnObjects(store).create("a", b"same") is None
        assert await OwnObjects(store).create("a", b"same") == b"same"

    asyncio.run(story())


def test_a_name_that_was_taken_and_collected_is_no_longer_to_be_had() -> None:
    class Collected(MemoryStore):
        async def put_if_absent(self, name: str, data: bytes) -> bool:
            return False

    with pytest.raises(Fenced, match="a was taken and collected"):
        asyncio.run(OwnObjects(Collected()).create("a", b"mine"))
