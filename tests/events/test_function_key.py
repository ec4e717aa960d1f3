"""The functions' key: made once, never guessed; events are signed, and nothing that matters can be changed in one."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from knapper import limits
from knapper.errors import TooLarge, Unauthorized, Unavailable
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.events.function_key import FunctionKey
from knapper.state import secrets
from knapper.store.memory import MemoryStore

BELL = Event(
    type=cloudevents.ROLLOUTS_SCORED, subject="local/adding/0123456789abcdef", id="a1", source="knapper/reward", step=7,
    kind="rl", model="00112233445566ff",
)  # fmt: skip


def ids() -> Callable[[], str]:
    numbers = itertools.count()
    return lambda: f"{next(numbers):032x}"


async def admitted(key: FunctionKey, headers: dict[str, str], body: bytes = b"") -> bytes:
    async def read(bytes_max: int) -> bytes:
        if len(body) > bytes_max:
            raise TooLarge(f"over {bytes_max}")
        return body

    return await key.admit(headers, read)


def test_it_is_made_once_and_everybody_over_the_store_has_the_same() -> None:
    async def story() -> None:
        store = MemoryStore()
        with pytest.raises(Unavailable, match="the store has no secrets/functions yet"):
            await FunctionKey(store).headers()
        new_id = ids()
        first, second = FunctionKey(store, new_id), FunctionKey(store, new_id)
        made = await first.headers()
        assert made == {"Authorization": f"Bearer {0:032x}{1:032x}"}
        assert await second.headers() == await FunctionKey(store).headers() == made
        assert await secrets.find(store, "functions") == f"{0:032x}{1:032x}".encode()

    asyncio.run(story())


def test_a_call_with_the_key_is_admitted_and_any_other_is_not_even_read() -> None:
    async def story() -> None:
        key = FunctionKey(MemoryStore(), ids())
        right = (await key.headers())["Authorization"]
        assert await admitted(key, {"authorization": right}, b"code") == b"code"

        async def read(_: int) -> bytes:
            raise AssertionError("a stranger's body is not read")

        wrong = ["", right[:-1], right + "0", right.lower(), right.removeprefix("Bearer "), "Bearer ", "Bearer \xff",
                 f"Basic {right[7:]}", "Bearer tml-local"]  # fmt: skip
        for authorization in wrong:
            with pytest.raises(Unauthorized, match="functions answer their own gateway"):
                await key.admit({"authorization": authorization, "content-type": "text/plain"}, read)
        with pytest.raises(Unauthorized):
            await key.admit({}, read)

    asyncio.run(story())


def test_an_event_of_this_deployment_is_admitted_from_any_broker() -> None:
    async def story() -> None:
        key = FunctionKey(MemoryStore(), ids())
        headers, body = (await key.sign(BELL)).encode()
        on_its_way = {**headers, "ce-traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
                      "ce-knativebrokerttl": "254", "ce-knativearrivaltime": "2026-01-01T00:00:00Z"}  # fmt: skip
        for sent in (headers, on_its_way):
            assert await admitted(key, sent, body) == body
        again = cloudevents.decode(headers, body).next(cloudevents.ADAPTER_STEPPED, "knapper/train_step", 8)
        assert again.signature == "", "the sender of the next event signs it"
        with pytest.raises(TooLarge):
            await admitted(key, headers, b"x" * (limits.event_bytes_max + 1))

    asyncio.run(story())


@pytest.mark.parametrize(
    "changed",
    [
        {"type": cloudevents.JOB_STARTED}, {"source": "knapper/sample"}, {"id": "a2"}, {"subject": "local/b/0"},
        {"step": 8}, {"step": None}, {"kind": "sft"}, {"model": ""}, {"data": b"{}"}, {"signature": ""},
        {"signature": "0" * 64}, {"signature": "é"}, {"id": "a", "subject": "1local/adding/0123456789abcdef"},
    ],
)  # fmt: skip
def test_an_event_that_was_changed_or_made_elsewhere_is_refused(changed: dict[str, object]) -> None:
    async def story() -> None:
        key = FunctionKey(MemoryStore(), ids())
        headers, body = replace(await key.sign(BELL), **changed).encode()  # type: ignore[arg-type]
        with pytest.raises(Unauthorized):
            await admitted(key, headers, body)
        elsewhere = FunctionKey(MemoryStore(), lambda: "f" * 32)
        headers, body = (await elsewhere.sign(BELL)).encode()
        with pytest.raises(Unauthorized):
            await admitted(key, headers, body)

    asyncio.run(story())


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"[" * 200_000, b'{"specversion":"1.0","id":"\\ud800","source":"s","type":"\\ud800"}'],
    ids=["nothing", "broken", "no object", "deep", "surrogates"],
)  # fmt: skip
def test_whatever_pretends_to_be_an_event_is_refused_as_a_stranger(body: bytes) -> None:
    async def story() -> None:
        key = FunctionKey(MemoryStore(), ids())
        with pytest.raises(Unauthorized):
            await admitted(key, {"content-type": "application/cloudevents+json"}, body)

    asyncio.run(story())
