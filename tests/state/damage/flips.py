"""Single bits that flip where something is stored."""

import random
from collections.abc import Iterator

from knapper.errors import KnapperError
from knapper.state.inventory import check
from knapper.store import Store
from knapper.store.memory import MemoryStore


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def bits(data: bytes, seed: str, most: int = 0) -> Iterator[int]:
    """All bits of it, or `most` of them, drawn."""
    whole = 8 * len(data)
    yield from range(whole) if not most or whole <= most else random.Random(seed).sample(range(whole), most)


async def copied(store: Store) -> MemoryStore:
    copy = MemoryStore()
    for name in await store.list(""):
        await copy.put_if_absent(name, await store.get(name) or b"")
    return copy


async def put(store: Store, name: str, data: bytes) -> None:
    """In the place of what lies there, as damage comes."""
    await store.delete(name)
    await store.put_if_absent(name, data)


async def error_of(store: Store, name: str) -> KnapperError | None:
    """What the product's own reader says of the object; None: it takes it for sound."""
    try:
        await check(store, name)
    except KnapperError as error:
        return error
    return None
