"""The server's secrets, created once and kept in the store: a reader of the store can sign as the server."""

import re
from collections.abc import Callable
from typing import Final, Literal

from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Store

Name = Literal["functions", "links", "tokens"]

_BARE: Final = re.compile(rb"[0-9a-f]{64}")  # their format before records had checksums


class Secret(Record, frozen=True):
    """The bytes of one secret."""

    secret: bytes


async def find(store: Store, name: Name) -> bytes | None:
    """The secret, or None if there is none yet. Raises Corrupt."""
    key = ObjectKind.SECRET.key(name)
    data = await store.get(key)
    return None if data is None else decode_secret(data, key)


async def get_or_create(store: Store, name: Name, new_id: Callable[[], str]) -> bytes:
    """The secret, created if there is none. `new_id`: 128 random bits in hexadecimal. Raises Corrupt."""
    if (secret := await find(store, name)) is not None:
        return secret
    await store.put_if_absent(ObjectKind.SECRET.key(name), encode(Secret(secret=(new_id() + new_id()).encode())))
    winner = await find(store, name)
    assert winner is not None, "it is never deleted while a server runs"
    return winner


def decode_secret(data: bytes, key: str) -> bytes:
    """The secret in a stored object. Raises Corrupt."""
    return data if _BARE.fullmatch(data) else decode(data, Secret, key).secret
