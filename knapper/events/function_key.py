"""The key of this deployment's functions: created once and kept in the store, for every reader of the store.

The gateway sends it with its calls. Events come through a Broker, which forwards no key and takes events from anything
in the cluster, so they carry their sender's signature instead. Clients and pages in a browser have neither.
"""

import hmac
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

import msgspec

from knapper import limits
from knapper.errors import Unauthorized, Unavailable, UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.state import secrets
from knapper.state.layout import ObjectKind
from knapper.store import Store

SECRET = ObjectKind.SECRET.key("functions")
_BEARER = "Bearer "


class FunctionKey:
    """`new_id`: 128 random bits in hexadecimal, for processes that create a missing key; the others only read it."""

    def __init__(self, store: Store, new_id: Callable[[], str] | None = None) -> None:
        self._store, self._new_id = store, new_id
        self._key = b""

    async def headers(self) -> dict[str, str]:
        """The headers of a call. Raises Unavailable while there is no key, StoreError."""
        return {"Authorization": _BEARER + (await self._read()).decode()}

    async def in_store(self) -> bool:
        """Whether the key that this process uses is still the store's. False: another store lies there now.

        Raises Corrupt, StoreError.
        """
        return not self._key or await secrets.find(self._store, "functions") == self._key

    async def sign(self, event: Event) -> Event:
        """The event with the signature that functions require."""
        return replace(event, signature=await self._signature(event))

    async def is_signed(self, headers: Mapping[str, str], body: bytes) -> bool:
        """Whether this deployment made the event. Attributes that a Broker or a trace adds do not count."""
        try:
            event = cloudevents.decode(headers, body)
            return hmac.compare_digest(event.signature.encode(), (await self._signature(event)).encode())
        except UserError:  # not an event of this deployment
            return False

    async def admit(self, headers: Mapping[str, str], read: Callable[[int], Awaitable[bytes]]) -> bytes:
        """The body of a call or an event. `read` reads at most so many bytes, and is not called for other requests.

        Raises Unauthorized, Unavailable while there is no key, and the errors of `read`.
        """
        if await self._opens(headers.get("authorization", "")):
            return await read(limits.body_bytes_max)
        if cloudevents.is_event(headers):
            body = await read(limits.event_bytes_max)
            if await self.is_signed(headers, body):
                return body
        raise Unauthorized(
            "functions answer their own gateway, and events that their own deployment signed; allowed: the header "
            f"Authorization with the key that the store has as {SECRET}. Clients call the gateway"
        )

    async def _opens(self, authorization: str) -> bool:
        return hmac.compare_digest(authorization.encode(), (await self.headers())["Authorization"].encode())

    async def _signature(self, event: Event) -> str:
        fields = [event.type, event.source, event.id, event.subject, event.step, event.kind, event.model, event.data]
        return hmac.digest(await self._read(), msgspec.json.encode(fields), "sha256").hex()

    async def _read(self) -> bytes:
        if not self._key and self._new_id is not None:
            self._key = await secrets.get_or_create(self._store, "functions", self._new_id)
        self._key = self._key or await secrets.find(self._store, "functions") or b""
        if not self._key:
            raise Unavailable(f"the store has no {SECRET} yet; the gateway makes it when it starts")
        return self._key
