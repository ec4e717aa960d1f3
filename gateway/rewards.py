"""Scores for a client's own training loop: the gateway forwards its rollouts to the reward function."""

from collections.abc import AsyncIterator

import httpx
from starlette.requests import Request
from starlette.responses import Response

from gateway import bodies
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import Unauthorized, Unavailable, UserError

_COLD_S = 60.0  # a function scaled to zero starts first
_TIMEOUT = httpx.Timeout(limits.rewards_request_s + _COLD_S, connect=5.0)
_CHUNK_BYTES = 256 * 1024  # between two chunks the event loop serves others
_JSON = "application/json"


async def score(request: Request) -> Response:
    gateway, _ = services_of(request), tenant_of(request)
    return await gateway.reward_client.score(await bodies.read(request))


class RewardClient:
    """Posts rollouts to the reward function at `url`; an empty one: this server has none."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def score(self, body: bytes) -> Response:
        """The function's own response. Raises UserError if this server has no reward function, and Unavailable."""
        if not self._url:
            raise UserError(
                "this server has no reward function; allowed: one whose operator sets KNAPPER_REWARD_URL, as `knapper "
                "up` does. Score in the client instead"
            )
        try:
            try:
                response = await self._post(body)
            except (httpx.NetworkError, httpx.RemoteProtocolError):  # its process ended, and another has replaced it
                response = await self._post(body)
        except httpx.HTTPError as error:
            raise Unavailable(f"the reward function does not answer: {error!r}") from error
        if response.status_code == Unauthorized.status:
            raise Unavailable(f"the reward function does not know this gateway: {response.text[:300]}")
        if response.headers.get("Content-Type", "").partition(";")[0] != _JSON:
            raise Unavailable(f"the reward function is not there yet: HTTP {response.status_code}")
        headers = {name: value for name, value in response.headers.items() if name == "retry-after"}
        return Response(response.content, response.status_code, headers, media_type=_JSON)

    async def _post(self, body: bytes) -> httpx.Response:
        headers = {"Content-Type": _JSON, "Content-Length": str(len(body))}
        return await self._client.post(self._url, content=_chunks(body), headers=headers, timeout=_TIMEOUT)


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _CHUNK_BYTES):
        yield bytes(memoryview(body)[start : start + _CHUNK_BYTES])
