"""Secrets of the server's own, made once for a store and kept in it: whoever reads the store can sign as the server."""

import re
from collections.abc import Callable
from typing import Final, Literal

from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Store

Name = Literal["functions", "links", "tokens"]

_BARE: Final = re.compile(rb"[0-9a-f]{64}")  # as they were kept before they had a checksum


class Secret(Record, frozen=True):
    """One secret."""

    secret: bytes


async def found(store: Store, name: Name) -> bytes | None:
    """The secret, or None if there is none yet. Raises Corrupt."""
    place = ObjectKind.SECRET.key(name)
    data = await store.get(place)
    return None if data is None else opened_bytes(data, place)


async def opened(store: Store, name: Name, new_id: Callable[[], str]) -> bytes:
    """The secret, made now if there is none. `new_id`: 128 random bits in hexadecimal. Raises Corrupt."""
    if (there := await found(store, name)) is not None:
        return there
    await store.put_if_absent(ObjectKind.SECRET.key(name), encode(Secret(secret=(new_id() + new_id()).encode())))
    made = await found(store, name)
    assert made is not None, "it is never deleted while a server runs"
    return made


def opened_bytes(data: bytes, place: str) -> bytes:
    """The secret in what is stored. Raises Corrupt."""
    return data if _BARE.fullmatch(data) else decode(data, Secret, place).secret
