"""Secrets of the server's own, made once for a store and kept in it: whoever reads the store can sign as the server."""

import re
from collections.abc import Callable
from typing import Final, Literal

from knapper.journal.records import Record, decode, encode
from knapper.store import Store

_BARE: Final = re.compile(rb"[0-9a-f]{64}")  # as they were kept before they had a checksum


class Secret(Record, frozen=True):
    """secrets/<name>"""

    secret: bytes


async def opened(store: Store, name: Literal["links", "tokens"], new_id: Callable[[], str]) -> bytes:
    """The secret, made now if there is none. `new_id`: 128 random bits in hexadecimal. Raises Corrupt."""
    place = f"secrets/{name}"
    await store.put_if_absent(place, encode(Secret(secret=(new_id() + new_id()).encode())))
    data = await store.get(place)
    assert data, "it is never deleted while a server runs"
    return opened_bytes(data, place)


def opened_bytes(data: bytes, place: str) -> bytes:
    """The secret in what is stored. Raises Corrupt."""
    return data if _BARE.fullmatch(data) else decode(data, Secret, place).secret
