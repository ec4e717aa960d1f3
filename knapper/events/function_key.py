"""The key that opens this deployment's functions: made once, kept in its store, known to whoever may read that.

The gateway sends it with its calls. Events come through a Broker, which sends nobody's key, and to which everybody in a
cluster may post: they carry a signature of who made them instead. Clients have neither, nor has a page in a browser.
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
    """`new_id`: 128 random bits in hexadecimal, of those who make the key where there is none; the others find it."""

    def __init__(self, store: Store, new_id: Callable[[], str] | None = None) -> None:
        self._store, self._new_id = store, new_id
        self._key = b""

    async def headers(self) -> dict[str, str]:
        """What a call carries. Raises Unavailable where there is no key yet, StoreError."""
        return {"Authorization": _BEARER + (await self._read()).decode()}

    async def sign(self, event: Event) -> Event:
        """The event, as the functions take it from any Broker."""
        return replace(event, signature=await self._signature(event))

    async def signed(self, headers: Mapping[str, str], body: bytes) -> bool:
        """Whether this is an event that this deployment made. What a Broker or a trace adds to it changes nothing."""
        try:
            event = cloudevents.decode(headers, body)
            return hmac.compare_digest(event.signature.encode(), (await self._signature(event)).encode())
        except UserError:  # whatever it is, nobody of ours sent it
            return False

    async def admit(self, headers: Mapping[str, str], read: Callable[[int], Awaitable[bytes]]) -> bytes:
        """The body of a call or an event; `read` reads at most so many bytes of it, and nothing of a stranger's.

        Raises Unauthorized, Unavailable where there is no key yet, and what `read` does.
        """
        if await self._opens(headers.get("authorization", "")):
            return await read(limits.body_bytes_max)
        if cloudevents.sent(headers):
            body = await read(limits.event_bytes_max)
            if await self.signed(headers, body):
                return body
        raise Unauthorized(
            "functions answer their own gateway, and events that their own deployment signed; allowed: the header "
            f"Authorization with the key that the store has as {SECRET}. Clients call the gateway"
        )

    async def _opens(self, authorization: str) -> bool:
        return hmac.compare_digest(authorization.encode(), (await self.headers())["Authorization"].encode())

    async def _signature(self, event: Event) -> str:
        said = [event.type, event.source, event.id, event.subject, event.step, event.kind, event.model, event.data]
        return hmac.digest(await self._read(), msgspec.json.encode(said), "sha256").hex()

    async def _read(self) -> bytes:
        if not self._key and self._new_id is not None:
            self._key = await secrets.opened(self._store, "functions", self._new_id)
        self._key = self._key or await secrets.found(self._store, "functions") or b""
        if not self._key:
            raise Unavailable(f"the store has no {SECRET} yet; the gateway makes it when it starts")
        return self._key
