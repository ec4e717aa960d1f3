"""Knative's activator in small: an ASGI proxy that wakes a function's process, and streams its answer as it comes.

    /train_step...  ->  the process that serves it, started if need be     (200, 503, ... whatever it answers)
    /lease/NAME...  ->  the address of that process, for as long as the answer is read  (knapper/web/lease.py)
    /               ->  {"engine": "stopped" | "starting" | "running"}     (for the gateway's and people's information)

Who has neither the functions' key nor an event of this deployment is refused, and starts nothing.
Delivery is at least once: a request that gets no answer because its process ended is sent once more, to a new one.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import structlog
from yarl import URL

from knapper.errors import KnapperError, NotFound, TooLarge, Unavailable
from knapper.local.on_demand import Service
from knapper.state.function_key import FunctionKey
from knapper.web import lease

log = structlog.get_logger()

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_HOP_BY_HOP = {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"proxy-connection"}
_REWRITTEN = {b"host", b"content-length"}
_attempts_max = 2
_connect_s = 5.0


@dataclass(frozen=True)
class Route:
    """Where requests below a prefix go: into this service, below `base` there ('' or '/name')."""

    service: Service
    base: str


class _Left(Exception):
    """The client closed the connection."""


class Dispatcher:
    """The ASGI application. Bodies are bounded and held (they may be sent twice); answers are never held."""

    def __init__(self, routes: Mapping[str, Route], key: FunctionKey) -> None:
        self.forwarded = 0  # requests that a process answered through here
        self._routes, self._key = routes, key
        self._client: aiohttp.ClientSession | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            body = await self._key.admit(_headers(scope), partial(_read, receive))
        except _Left:
            return
        except KnapperError as error:
            await _refuse(send, error)
            return
        answering = asyncio.create_task(self._answer(scope, body, send))
        leaving = asyncio.create_task(_until_left(receive))
        await asyncio.wait([answering, leaving], return_when=asyncio.FIRST_COMPLETED)
        for task in (answering, leaving):
            task.cancel()
        await asyncio.wait([answering, leaving])
        if not answering.cancelled() and (defect := answering.exception()):
            log.error("dispatcher: defect", path=scope["path"], exc_info=defect)

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def _session(self) -> aiohttp.ClientSession:
        """Made inside the running loop. httpx would do but for crowds: its pool looks at every connection each time."""
        if self._client is None:
            self._client = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_connect_s),
                auto_decompress=False,
                skip_auto_headers=("User-Agent", "Accept", "Content-Type"),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._client

    async def _answer(self, scope: Mapping[str, Any], body: bytes, send: Send) -> None:
        try:
            if scope["path"] == "/":
                states = {route.service.name: route.service.state for route in self._routes.values()}
                await _reply(send, 200, states)
                return
            if scope["path"].startswith(lease.PATH + "/"):
                await self._lend(*self._route(scope["path"].removeprefix(lease.PATH)), send)
                return
            route, path = self._route(scope["path"])
            url = path + ("?" + scope["query_string"].decode("latin-1") if scope["query_string"] else "")
            offer = (lease.HEADER.encode(), f"{lease.PATH}/{scope['path'].split('/')[1]}".encode())
            for attempt in range(1, _attempts_max + 1):
                asked = (scope["method"], url, _request_headers(scope), body)
                if await self._forward(route.service, *asked, send, offer):
                    return
                log.warning(f"{route.service.name}: ended before it answered", attempt=attempt)
            raise Unavailable(f"{route.service.name} ended twice before it answered (see the log)")
        except KnapperError as error:
            await _refuse(send, error)

    def _route(self, path: str) -> tuple[Route, str]:
        for prefix, route in self._routes.items():
            if path == prefix or path.startswith(prefix + "/"):
                return route, f"{route.base}/{path[len(prefix) + 1 :]}"
        raise NotFound(f"the dispatcher has no function at {path!r}; it has: {', '.join(self._routes)}")

    async def _forward(
        self, service: Service, method: str, url: str, headers: list[tuple[str, str]], body: bytes, send: Send,
        offer: tuple[bytes, bytes],
    ) -> bool:  # fmt: skip
        """False if there was no answer, so that nothing has been sent to the client yet."""
        async with service.use() as running:
            try:
                answer = await self._session().request(
                    method, URL(running.url + url, encoded=True), headers=headers, data=body, allow_redirects=False
                )
            except aiohttp.ClientConnectionError as error:
                log.debug(f"{service.name}: {type(error).__name__}", pid=running.process.pid)
                await service.lost(running)
                return False
            self.forwarded += 1
            try:
                await send(
                    {"type": "http.response.start", "status": answer.status, "headers": _answer_headers(answer, offer)}
                )
                async for chunk in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            except aiohttp.ClientError as error:  # the client sees a broken answer: it is not completed here
                log.warning(f"{service.name}: the answer broke off", pid=running.process.pid, reason=str(error))
            finally:
                answer.release()
            return True

    async def _lend(self, route: Route, path: str, send: Send) -> None:
        """The process's address, until it ends or nobody listens. Raises Unavailable if there is none to lend."""
        if route.service.state != "running":
            raise Unavailable(f"{route.service.name} does not run")
        async with route.service.use() as running:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": f"{running.url}{path}\n".encode(), "more_body": True})
            await running.process.ending()
            await send({"type": "http.response.body", "body": b""})


async def _read(receive: Receive, bytes_max: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Left
        size += len(message.get("body", b""))
        if size > bytes_max:
            raise TooLarge(f"the body has over {bytes_max} bytes, the most that a function accepts")
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _headers(scope: Mapping[str, Any]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def _request_headers(scope: Mapping[str, Any]) -> list[tuple[str, str]]:
    kept = [(name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP | _REWRITTEN]
    if not any(name == b"accept-encoding" for name, _ in kept):
        kept.append((b"accept-encoding", b"identity"))  # or aiohttp would ask for gzip in the client's name
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in kept]


def _answer_headers(answer: aiohttp.ClientResponse, offer: tuple[bytes, bytes]) -> Headers:
    kept = [(name.lower(), value) for name, value in answer.raw_headers if name.lower() not in _HOP_BY_HOP]
    return [*kept, offer]


async def _refuse(send: Send, error: KnapperError) -> None:
    headers = []
    if isinstance(error, Unavailable):
        headers.append((b"retry-after", str(max(1, round(error.retry_after_s))).encode()))
    await _reply(send, error.status, error.as_json(), headers)


async def _reply(send: Send, status: int, body: object, headers: Headers | None = None) -> None:
    content = json.dumps(body).encode()
    plain = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": plain + (headers or [])})
    await send({"type": "http.response.body", "body": content})
