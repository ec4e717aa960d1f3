"""Several gateways behind one Service, which clients take for one.

A session has a home, the gateway that takes all of its samples: a request for one that comes elsewhere is forwarded
there, so that a repetition finds the first. A poll goes to the gateway whose name is in the request's id. The client's
own credentials go along, and that gateway authorises as always; a forwarded request is marked, and never forwarded
again. Before credentials are sent, and while an answer is awaited, a gateway must say its name when it is asked.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
import structlog
from starlette.requests import Request
from starlette.responses import Response

from knapper import limits
from knapper.errors import KnapperError, Unavailable
from knapper.state.gateways import Gateways, Member

NAME = "Knapper-Gateway"  # a header of healthz: which gateway answers
_REQUEST_ID = re.compile(r"s-([0-9a-f]{32})-[0-9a-f]{32}")
_FORWARDED = "Knapper-Forwarded"
_SENT = ("x-api-key", "authorization", "accept")
_RETURNED = ("retry-after", "www-authenticate", "x-should-retry", "x-deprecation-note", "x-deprecation-level")
_CONNECT_S = 2.0
_SPARE_S = 5.0  # the owner answers within limits.poll_hold_s, and the SDK gives up at 45 s
_LOOK_S = 5.0  # one that said its name is asked again after this
_SILENT_S = 10.0  # one that does not say it for so long has stopped
_GONE_S = 15.0  # and is asked again after this
_FAILING_S = 20.0  # one that answers 5xx for so long is left out as well
_MISSED_MAX = 2
_KNOWN_MAX = 64  # gateways whose health is kept; what is forgotten is asked for anew

log = structlog.get_logger()


@dataclass
class _Health:
    """What is known of another gateway. Times are monotonic."""

    answers: bool = True
    looked_at: float = float("-inf")
    missed: int = 0  # looks in a row at which it did not say its name
    failing_since: float | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Peers:
    """The other gateways over this store. `http` sends nothing of its own, no key of the functions either.

    `now`: monotonic seconds.
    """

    def __init__(self, http: aiohttp.ClientSession, gateways: Gateways, now: Callable[[], float]) -> None:
        self._http, self._now = http, now
        self._health: dict[str, _Health] = {}
        self.gateways = gateways

    async def ask_owner(self, request: Request, request_id: str, body: bytes) -> Response | None:
        """The answer of the gateway that keeps the sample; None if it is this one, or is gone.

        Raises StoreError, and Unavailable while the owner lives and its answer is lost or a 5xx.
        """
        owner = _REQUEST_ID.fullmatch(request_id)
        if owner is None or _FORWARDED in request.headers:
            return None
        member = await self.gateways.find(owner[1])
        answer = None if member is None else await self._ask(member, request, body)
        if answer is not None and answer.status_code >= 500:
            raise Unavailable(f"the gateway that keeps sample {request_id} answers {answer.status_code}")
        return answer

    async def ask_home(
        self, request: Request, session: str, created_at: Callable[[], Awaitable[float]], body: bytes
    ) -> Response | None:
        """The answer of the session's home; None if it is this gateway.

        `created_at`: of the session, asked for where there are several gateways. Raises StoreError, and Unavailable
        when an answer is lost: whoever sends the request again has the answer to the first.
        """
        if _FORWARDED in request.headers:
            return None
        await self.gateways.publish()
        if not await self.gateways.others():
            return None
        at, gone = await created_at(), set[str]()
        while (home := self.gateways.home(session, at, gone)) is not None and home.gateway != self.gateways.gateway:
            if (answer := await self._ask(home, request, body)) is not None:
                return answer
            gone.add(home.gateway)
        return None

    async def tell_others(self, request: Request, body: bytes) -> None:
        """Let all others do as this gateway did, as far as they can be reached."""
        if _FORWARDED in request.headers:
            return
        try:
            await asyncio.gather(*(self._ask(member, request, body) for member in await self.gateways.others()))
        except KnapperError as error:
            log.warning("other gateways were not told", path=request.url.path, reason=str(error))

    async def remove_dead(self) -> None:
        """Delete the names of gateways that died. Raises StoreError."""
        for member in await self.gateways.others():
            for _ in range(_MISSED_MAX):
                if await self._says_its_name(member):
                    break
            else:
                await self.gateways.remove(member)

    async def _ask(self, member: Member, request: Request, body: bytes) -> Response | None:
        """The answer of another gateway; None if it is gone. Raises StoreError, Unavailable if its answer is lost."""
        if not await self._lives(member):
            return None
        asking = asyncio.ensure_future(self._send(member, request, body))
        try:
            while not (await asyncio.wait({asking}, timeout=_LOOK_S))[0]:
                if not await self._lives(member):
                    return None
            answer = asking.result()
        except (aiohttp.ClientError, TimeoutError) as error:
            log.warning("another gateway's answer is lost", address=member.address, reason=type(error).__name__)
            self._health_of(member).looked_at = float("-inf")
            if not await self._lives(member):
                return None
            raise Unavailable("another gateway of this server did not answer; send the request again") from error
        finally:
            asking.cancel()
        return None if self._fails(member, answer.status_code) else answer

    async def _send(self, member: Member, request: Request, body: bytes) -> Response:
        headers = {name: value for name in _SENT if (value := request.headers.get(name)) is not None}
        headers |= {"Content-Type": "application/json", _FORWARDED: "1"}
        timeout = aiohttp.ClientTimeout(total=limits.poll_hold_s + _SPARE_S, sock_connect=_CONNECT_S)
        async with self._http.post(
            member.address + request.url.path, data=body, headers=headers, timeout=timeout, allow_redirects=False
        ) as answer:
            content = await answer.read()
        kept = {name: value for name in _RETURNED if (value := answer.headers.get(name)) is not None}
        return Response(content, answer.status, kept, answer.content_type)

    def _fails(self, member: Member, status: int) -> bool:
        """Whether it has answered nothing but 5xx for a while; then it is left out, like one that is gone."""
        health, now = self._health_of(member), self._now()
        if status < 500:
            health.failing_since = None
            return False
        if health.failing_since is None:
            health.failing_since = now
        if now - health.failing_since < _FAILING_S:
            return False
        log.warning("another gateway fails, and is left out", address=member.address, status=status)
        health.answers, health.looked_at = False, now
        return True

    async def _lives(self, member: Member) -> bool:
        """Whether it said its name lately. Raises StoreError."""
        health = self._health_of(member)
        async with health.lock:
            if self._now() - health.looked_at < (_LOOK_S if health.answers else _GONE_S):
                return health.answers
            health.answers = await self._says_its_name(member)
            health.looked_at = self._now()
            health.missed = 0 if health.answers else health.missed + 1
        if not health.answers:
            log.warning("another gateway does not answer", address=member.address)
            if health.missed >= _MISSED_MAX:  # once more than that may be a moment's trouble; it would come back
                await self.gateways.remove(member)
        return health.answers

    async def _says_its_name(self, member: Member) -> bool:
        timeout = aiohttp.ClientTimeout(total=_SILENT_S, sock_connect=_CONNECT_S)
        try:
            async with self._http.get(
                f"{member.address}/api/v1/healthz", timeout=timeout, allow_redirects=False
            ) as answer:
                return answer.headers.get(NAME) == member.gateway
        except (aiohttp.ClientError, TimeoutError):
            return False

    def _health_of(self, member: Member) -> _Health:
        if member.gateway not in self._health and len(self._health) >= _KNOWN_MAX:
            self._health.clear()
        return self._health.setdefault(member.gateway, _Health())
