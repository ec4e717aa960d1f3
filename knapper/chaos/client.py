"""The protocol over plain HTTP, with a client's retries and polls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from knapper.errors import Gone, InvalidField, Unavailable, UserError

_TIMEOUT = httpx.Timeout(45.0, connect=5.0)
_HEARTBEAT_S = 30.0
_PAUSE_S = 0.1
PATIENCE_S = 1800.0  # without an answer: longer than any cold start


@dataclass(frozen=True)
class Response:
    """`body`: protobuf where there is a form for it."""

    body: bytes
    protobuf: bool

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(self.body)
        return found


class ChaosClient:
    """`clock`: seconds, from any start. `longest`: what was waited for longest, and for how many seconds."""

    def __init__(self, url: str, key: str, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self.url, self._clock, self._sleep = url.rstrip("/"), clock, sleep
        headers = {"X-API-Key": key, "Accept": "application/x-protobuf, application/json"}
        self._http = httpx.Client(base_url=f"{self.url}/api/v1/", headers=headers, timeout=_TIMEOUT)
        self._session, self._heard_at = "", clock()
        self.longest = (0.0, "")

    def close(self) -> None:
        self._http.close()

    def start(self) -> str:
        """A new session, kept alive from now on; what was waited for is forgotten."""
        asked = {"tags": ["chaos"], "user_metadata": None, "sdk_version": "0.38.0", "type": "create_session"}
        self._session = str(self.post("create_session", asked)["session_id"])
        self._heard_at, self.longest = self._clock(), (0.0, "")
        return self._session

    def finish(self) -> None:
        self.post(f"/sessions/{self._session}/finish", {"reason": {"type": "success"}})

    def get(self, path: str) -> dict[str, Any]:
        return Response(self._send("GET", path).content, protobuf=False).json()

    def download(self, url: str) -> bytes:
        """What a signed link leads to. Raises InvalidField for one that leads elsewhere than to this gateway."""
        if not url.startswith(f"{self.url}/"):
            raise InvalidField("link", url, f"one on {self.url}", "Give --url as the gateway names itself")
        return self._send("GET", url).content

    def post(self, path: str, body: bytes | dict[str, Any]) -> dict[str, Any]:
        """What is answered at once. Dictionaries go as JSON, bytes as protobuf."""
        kind = "application/x-protobuf" if isinstance(body, bytes) else "application/json"
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        return Response(self._send("POST", path, content, kind).content, protobuf=False).json()

    def wait(self, request_id: str) -> Response:
        """What was promised. Raises UserError for a failure, Gone for a sample that ended with its gateway."""
        asked = msgspec.json.encode({"request_id": request_id, "allow_metadata_only": False})
        reply = self._send("POST", "retrieve_future", asked, "application/json")
        answer = Response(reply.content, "protobuf" in reply.headers.get("content-type", ""))
        if not answer.protobuf and (failed := answer.json().get("error")):
            raise UserError(f"{request_id} failed: {failed}")
        return answer

    def note(self, what: str, began: float) -> None:
        self.longest = max(self.longest, (self._clock() - began, what))

    def now(self) -> float:
        return self._clock()

    def _send(self, method: str, path: str, content: bytes = b"", kind: str = "") -> httpx.Response:
        """A 2xx answer. Retries when the server does not answer, or asks to try again."""
        until = self._clock() + PATIENCE_S
        headers = {"Content-Type": kind} if kind else {}
        while True:
            self._keep_alive()
            try:
                reply = self._http.request(method, path, content=content, headers=headers)
                last = f"{reply.status_code} {reply.text[:300]}" if reply.status_code >= 400 else ""
                status = reply.status_code
                if status < 300:
                    return reply
            except httpx.TransportError as error:
                last, status = str(error), 503
            if status == 410 and path == "retrieve_future":
                raise Gone(last)
            if status not in (408, 429) and status < 500:
                raise UserError(f"{method} {path}: {last}")
            if self._clock() > until:
                raise Unavailable(f"{method} {path}: no answer within {PATIENCE_S:.0f} s; the last answer was: {last}")
            self._sleep(_PAUSE_S)

    def _keep_alive(self) -> None:
        if self._session and self._clock() > self._heard_at + _HEARTBEAT_S:
            self._heard_at = self._clock()
            try:
                self._http.post("session_heartbeat", json={"session_id": self._session, "type": "session_heartbeat"})
            except httpx.TransportError:
                pass  # the next one comes soon
