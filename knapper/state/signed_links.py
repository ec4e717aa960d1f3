"""Signed links: URLs that work without a key for an hour. The signature makes them impossible to guess.

The target is in the link, under the signature; nothing else in the request counts. A link gives no more than its owner
could read at that moment: links to a deleted checkpoint lead nowhere.
"""

import base64
import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from knapper.errors import Gone, NotFound
from knapper.state import secrets
from knapper.state.journal.records import Record, decode, encode
from knapper.store import Store
from knapper.wire.untrusted import parsing

_MAC_BYTES = hashlib.sha256().digest_size


class Link(Record, frozen=True):
    """The target of a link, and the tenant it was made for."""

    kind: Literal["weights", "trace"]
    tenant: str
    subject: str  # a tinker:// path, or a session
    expires_at: float
    part: str = ""  # of a checkpoint: the file
    bundle: str = ""  # of a checkpoint: its version


@dataclass
class Links:
    """`clock`: seconds since the epoch. `new_id`: 128 random bits in hexadecimal."""

    store: Store
    clock: Callable[[], float]
    new_id: Callable[[], str]
    _secret: bytes = field(default=b"", repr=False)

    async def sign(self, link: Link) -> str:
        """The token of the link; safe in a URL's path."""
        content = encode(link)
        return base64.urlsafe_b64encode(await self._mac(content) + content).decode().rstrip("=")

    async def open(self, token: str) -> Link:
        """The link. Raises NotFound unless this server made it, Gone once it has expired."""
        unknown = NotFound("this link is not one that this server made, or it was cut; ask for a new one")
        with parsing(lambda _: unknown):
            signed = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
        mac, content = signed[:_MAC_BYTES], signed[_MAC_BYTES:]
        if not hmac.compare_digest(mac, await self._mac(content)):
            raise unknown
        link = decode(content, Link, "link")
        if link.expires_at <= self.clock():
            raise Gone("this link has expired; ask for a new one")
        return link

    async def _mac(self, content: bytes) -> bytes:
        if not self._secret:
            self._secret = await secrets.get_or_create(self.store, "links", self.new_id)
        return hmac.digest(self._secret, content, "sha256")
