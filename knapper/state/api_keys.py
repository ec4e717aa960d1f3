"""API keys: which client may act for which tenant. The store has only a key's hash; the key itself is shown once.

Version 1 of a key's record creates it, version 2 revokes it.

A key is 256 random bits, so one round of SHA-256 protects it: there is nothing to guess. Its id is the beginning of
its hash: the key leads to its record, but the record reveals nothing of the key.
"""

import asyncio
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from knapper import limits
from knapper.errors import InvalidField, NotFound, Unauthorized, UserError
from knapper.ids import Tenant
from knapper.state import damage
from knapper.state.journal.records import Record, decode, encode
from knapper.state.layout import ObjectKind
from knapper.store import Store
from knapper.store.cache import LruCache

PREFIX = "tml-"  # the SDK accepts no other

_KEY = re.compile(r"tml-[0-9a-f]{64}")
_ID = re.compile(r"[0-9a-f]{12}")
_ID_DIGITS = 12  # few enough that a number made of them is exact in every JSON reader


class Key(Record, frozen=True):
    """The record of a key. Times in seconds since the epoch."""

    id: str
    tenant: str
    sha256: bytes
    created_at: float
    note: str = ""
    revoked_at: float = 0.0  # 0: valid


@dataclass(frozen=True)
class Keys:
    """The keys of a store. `clock`: seconds since the epoch."""

    store: Store
    clock: Callable[[], float]

    async def create(self, tenant: Tenant, note: str, new_secret: Callable[[], str]) -> tuple[str, Key]:
        """(the key, its record), durable on return. `new_secret`: 256 random bits as 64 hexadecimal digits."""
        if len(note) > limits.key_note_chars_max or not note.isprintable():
            allowed = f"at most {limits.key_note_chars_max} characters, all of them printable"
            raise InvalidField("note", note, allowed)
        while True:
            key = PREFIX + new_secret()
            digest = _hash(key)
            record = Key(id=_id(digest), tenant=tenant, sha256=digest, created_at=self.clock(), note=note)
            if await self.store.put_if_absent(_version(record.id, 1), encode(record)):  # else another key has this id
                return key, record

    async def listed(self) -> list[Key]:
        """The newest version of each, the oldest key first."""
        newest = {
            name.rpartition("/")[0]: name for name in await self.store.list(ObjectKind.API_KEY.under())
        }  # sorted: the last one stays
        keys = await damage.readable(newest.values(), self._read)
        return sorted([key for key in keys if key is not None], key=lambda key: (key.created_at, key.id))

    async def revoke(self, key_id: str) -> Key:
        """Revoke the key for good; a repetition changes nothing. Raises NotFound."""
        if key_id.startswith(PREFIX):  # a message must not repeat it
            raise UserError("this is a key; allowed: its id, which `knapper key list` prints")
        first = await self._read(_version(key_id, 1)) if _ID.fullmatch(key_id) else None
        if first is None:
            raise NotFound(f"key {key_id!r} does not exist; `knapper key list` prints the ids of those that do")
        revoked = msgspec.structs.replace(first, revoked_at=self.clock())
        await self.store.put_if_absent(_version(key_id, 2), encode(revoked))
        return await self.revoked(key_id) or revoked

    async def created(self, key_id: str) -> Key | None:
        """The key as it was created, revoked or not."""
        return await self._read(_version(key_id, 1))

    async def revoked(self, key_id: str) -> Key | None:
        """The version that revokes it, or None while it is valid."""
        return await self._read(_version(key_id, 2))

    async def is_revoked(self, key_id: str) -> bool:
        """Reads one name, since a key has no third version. A damaged revocation counts too."""
        return await self.store.get(_version(key_id, 2)) is not None

    async def _read(self, name: str) -> Key | None:
        data = await self.store.get(name)
        return None if data is None else decode(data, Key, name)


@dataclass
class _Seen:
    """A key in a gateway's memory. `valid_at`: the start of the last check that found it valid."""

    key: Key
    valid_at: float = float("-inf")
    revoked: bool = False
    check: asyncio.Task[None] | None = None


class Keyring:
    """A gateway's cache of keys, checked so often that a revoked key is refused within a second.

    `now`: monotonic seconds.
    """

    def __init__(self, keys: Keys, now: Callable[[], float]) -> None:
        self._keys = keys
        self._now = now
        self._seen: LruCache[str, _Seen] = LruCache()

    async def of_key(self, key: str) -> Key:
        """The record of a valid key. Raises Unauthorized, which never repeats the key."""
        if not _KEY.fullmatch(key):
            raise _unknown()
        digest = _hash(key)
        seen = await self._find(_id(digest))
        if not hmac.compare_digest(seen.key.sha256, digest):
            raise _unknown()
        return await self._valid(seen)

    async def of_id(self, key_id: str) -> Key:
        """The record of a valid key, for a token that was issued for it. Raises Unauthorized."""
        return await self._valid(await self._find(key_id))

    async def revoke(self, key: Key) -> None:
        """Revoke the key; this gateway refuses it at once."""
        await self._keys.revoke(key.id)
        (await self._find(key.id)).revoked = True

    async def _find(self, key_id: str) -> _Seen:
        async def load() -> _Seen:
            if (key := await self._keys.created(key_id)) is None:
                raise _unknown()
            return _Seen(key)

        return await self._seen.get(key_id, load)

    async def _valid(self, seen: _Seen) -> Key:
        """The key's record. All requests with one key share one check of the store."""
        if not seen.revoked and seen.check is None and self._now() - seen.valid_at >= limits.key_fresh_s:
            seen.check = asyncio.create_task(self._check(seen))
            # If every request is cancelled meanwhile, nothing else retrieves the exception.
            seen.check.add_done_callback(lambda task: task.cancelled() or task.exception())
        if seen.check is not None:
            await asyncio.shield(seen.check)
        if seen.revoked:
            raise Unauthorized(f"key {seen.key.id} was revoked; ask the operator for another (`knapper key create`)")
        return seen.key

    async def _check(self, seen: _Seen) -> None:
        began = self._now()
        try:
            seen.revoked = await self._keys.is_revoked(seen.key.id)
            seen.valid_at = began
        finally:
            seen.check = None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _id(digest: bytes) -> str:
    return digest.hex()[:_ID_DIGITS]


def _version(key_id: str, n: int) -> str:
    return ObjectKind.API_KEY.key(key_id, n)


def _unknown() -> Unauthorized:
    return Unauthorized(
        "X-API-Key is not a key of this server; allowed: one that its operator made with `knapper key create`; "
        "set TINKER_API_KEY to it"
    )
