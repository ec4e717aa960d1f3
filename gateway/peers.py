"""Several gateways behind one Service: a poll of a sample that another gateway keeps is forwarded to it, once.

A request id names the gateway that keeps the sample. Its address comes from the store. The client's own credentials go
along, and the owner authorises as always; a forwarded request is marked, and never forwarded again.
"""

import re

import aiohttp
import structlog
from starlette.requests import Request
from starlette.responses import Response

from knapper import limits
from knapper.state.gateways import Gateways

_REQUEST_ID = re.compile(r"s-([0-9a-f]{32})-[0-9a-f]{32}")
_FORWARDED = "Knapper-Forwarded"
_SENT = ("x-api-key", "authorization", "accept")
_RETURNED = ("retry-after", "www-authenticate", "x-should-retry", "x-deprecation-note", "x-deprecation-level")
_CONNECT_S = 2.0
_SPARE_S = 5.0  # the owner answers within limits.poll_hold_s, and the SDK gives up at 45 s

log = structlog.get_logger()


class Peers:
    """The other gateways over this store. `http` sends nothing of its own, no key of the functions either."""

    def __init__(self, http: aiohttp.ClientSession, gateways: Gateways) -> None:
        self._http = http
        self.gateways = gateways

    async def forward(self, request: Request, request_id: str, body: bytes) -> Response | None:
        """The answer of the gateway that keeps the sample; None if it is this one, is gone, or does not answer.

        Raises StoreError.
        """
        owner = _REQUEST_ID.fullmatch(request_id)
        if owner is None or _FORWARDED in request.headers:
            return None
        address = await self.gateways.address_of(owner[1])
        if not address:
            return None
        headers = {name: value for name in _SENT if (value := request.headers.get(name)) is not None}
        headers |= {"Content-Type": "application/json", _FORWARDED: "1"}
        timeout = aiohttp.ClientTimeout(total=limits.poll_hold_s + _SPARE_S, sock_connect=_CONNECT_S)
        try:
            async with self._http.post(
                address + request.url.path, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("the gateway that keeps a sample does not answer", address=address, reason=type(error).__name__)
            return None
        if answer.status >= 500:
            log.warning("the gateway that keeps a sample fails", address=address, status=answer.status)
            return None
        kept = {name: value for name in _RETURNED if (value := answer.headers.get(name)) is not None}
        return Response(content, answer.status, kept, answer.content_type)
