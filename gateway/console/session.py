"""BrowserSessions of browsers: a signed cookie that names a key, and a token for the forms of its pages.

Nothing of a session is stored: the cookie says whose it is and when it ends, under a signature. It ends with its key,
within a second. The API takes no cookies, and a cookie is no key: only the console's own pages read it.
"""

import base64
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from knapper import limits
from knapper.errors import Unauthorized, UserError
from knapper.state import secrets
from knapper.store import Store
from knapper.wire.untrusted import parsing

_MAC_BYTES = hashlib.sha256().digest_size


class BrowserSession(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`tenant`: empty before signing in. `key`: its id, empty while keys are off. `nonce`: random."""

    tenant: str
    key: str
    nonce: str
    expires_at: float


@dataclass
class BrowserSessions:
    """`clock`: seconds since the epoch. `new_id`: 128 random bits in hexadecimal."""

    store: Store
    clock: Callable[[], float]
    new_id: Callable[[], str]
    _secret: bytes = field(default=b"", repr=False)

    def begin(self, tenant: str = "", key: str = "") -> BrowserSession:
        return BrowserSession(tenant, key, self.new_id(), self.clock() + limits.console_session_s)

    async def seal(self, session: BrowserSession) -> str:
        """The cookie's value."""
        content = msgspec.json.encode(session)
        return base64.urlsafe_b64encode(await self._mac(b"session", content) + content).decode().rstrip("=")

    async def open(self, cookie: str) -> BrowserSession:
        """Raises Unauthorized for a cookie that has expired or that this server did not make."""
        with parsing(_not_ours):
            signed = base64.urlsafe_b64decode(cookie + "=" * (-len(cookie) % 4))
        mac, content = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, await self._mac(b"session", content)):
            raise _not_ours(None)
        session = msgspec.json.decode(content, type=BrowserSession)
        if session.expires_at <= self.clock():
            raise Unauthorized("this session has expired; sign in again")
        return session

    async def csrf(self, session: BrowserSession) -> str:
        """The token that a form of this session's pages carries: another site cannot know it."""
        return (await self._mac(b"csrf", session.nonce.encode())).hex()

    async def expect_csrf(self, session: BrowserSession, token: str) -> None:
        """Raises UserError."""
        if not hmac.compare_digest((await self.csrf(session)).encode(), token.encode()):
            raise UserError("the form was not made for this session, or is too old; load its page again, and resend it")

    async def _mac(self, purpose: bytes, content: bytes) -> bytes:
        """By a key of this purpose alone: no signature is good for anything else that the server signs."""
        if not self._secret:
            self._secret = await secrets.get_or_create(self.store, "tokens", self.new_id)
        return hmac.digest(hmac.digest(self._secret, b"console " + purpose, "sha256"), content, "sha256")


def _not_ours(_: Exception | None) -> Unauthorized:
    return Unauthorized("this session is not one of this server; sign in again")
