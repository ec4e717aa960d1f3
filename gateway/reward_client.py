"""The reward function, as the gateway reaches it."""

from collections.abc import AsyncIterator

import httpx
from starlette.responses import Response

from knapper import limits
from knapper.errors import Unauthorized, Unavailable, UserError

_COLD_S = 60.0  # a function that was asleep starts first
_TIMEOUT = httpx.Timeout(limits.rewards_request_s + _COLD_S, connect=5.0)
_PIECE_BYTES = 256 * 1024  # sent at once: in between, others are served
_JSON = "application/json"


class Rewards:
    """Sends rollouts there, and brings back what it says."""

    def __init__(self, client: httpx.AsyncClient, url: str) -> None:
        self._client = client
        self._url = url

    async def score(self, body: bytes) -> Response:
        """Its scores, or why there are none. Raises UserError where there is no such function, Unavailable."""
        if not self._url:
            raise UserError(
                "this server has no reward function; allowed: one whose operator sets KNAPPER_REWARD_URL, as `knapper "
                "up` does. Score in the client instead"
            )
        try:
            try:
                answer = await self._post(body)
            except (httpx.NetworkError, httpx.RemoteProtocolError):  # its process ended meanwhile; there is another
                answer = await self._post(body)
        except httpx.HTTPError as error:
            raise Unavailable(f"the reward function does not answer: {error!r}") from error
        if answer.status_code == Unauthorized.status:
            raise Unavailable(f"the reward function does not know this gateway: {answer.text[:300]}")
        if answer.headers.get("Content-Type", "").partition(";")[0] != _JSON:
            raise Unavailable(f"the reward function is not there yet: HTTP {answer.status_code}")
        headers = {name: value for name, value in answer.headers.items() if name == "retry-after"}
        return Response(answer.content, answer.status_code, headers, media_type=_JSON)

    async def _post(self, body: bytes) -> httpx.Response:
        headers = {"Content-Type": _JSON, "Content-Length": str(len(body))}
        return await self._client.post(self._url, content=_pieces(body), headers=headers, timeout=_TIMEOUT)


async def _pieces(body: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(body), _PIECE_BYTES):
        yield bytes(memoryview(body)[at : at + _PIECE_BYTES])
