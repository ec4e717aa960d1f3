"""Delivers one event to one subscriber, like Knative: the meaning of answers, retries, and dead letters.

2xx with an empty body is done; 2xx with a CloudEvent is done too, and that event goes back into the broker; 2xx with
anything else is an error. 5xx, 404, 408, 409, 429 and no answer at all are tried again, later and later; everything
else is poison and goes to the dead letters at once.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import aiohttp
import structlog

from knapper import limits
from knapper.errors import TooMany, UserError
from knapper.events import cloudevents
from knapper.web.backoff import Backoff

_AGAIN: Final = (404, 408, 409, 429)
_RETRIES_MAX: Final = 12
_BACK_OFF_S, _BACK_OFF_MAX_S = 0.2, 30.0
_TIMEOUT = aiohttp.ClientTimeout(total=600.0, sock_connect=5.0)
_HOPS: Final = "ce-knativebrokerttl"  # how many replies in a row may still follow an event
HOPS_MAX: Final = 255
_ERROR_CHARS_MAX: Final = 1024

log = structlog.get_logger()


@dataclass(frozen=True)
class Letter:
    """An event in binary mode, with all its attributes."""

    headers: Mapping[str, str]
    body: bytes

    @property
    def attributes(self) -> dict[str, str]:
        return {name[3:]: value for name, value in self.headers.items() if name.startswith("ce-")}

    @property
    def hops_left(self) -> int:
        text = self.headers.get(_HOPS, "")
        return min(int(text), HOPS_MAX) if text.isdecimal() and len(text) < 6 else HOPS_MAX

    def with_hops(self, left: int) -> "Letter":
        return Letter({**self.headers, _HOPS: str(left)}, self.body)


class Delivery:
    """`reply`: called with each event that a subscriber answers. `dead_url`: where dead letters go."""

    def __init__(
        self,
        client: aiohttp.ClientSession,
        reply: Callable[[Letter], Awaitable[None]],
        dead_url: str,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._client, self._reply, self._dead_url, self._sleep = client, reply, dead_url, sleep

    async def deliver(self, letter: Letter, url: str) -> None:
        """Return once it is delivered, or a dead letter."""
        status, content = await self._try(letter, url, lambda status: status < 0 or status >= 500 or status in _AGAIN)
        if status:
            await self._dead_letter(letter, url, status, content)

    async def _try(self, letter: Letter, url: str, again: Callable[[int], bool]) -> tuple[int, bytes]:
        """The last attempt's status, 0 for success, and its answer."""
        backoff = Backoff(_BACK_OFF_S, _BACK_OFF_MAX_S)
        status, content, after_s = await self._attempt(letter, url)
        for _ in range(_RETRIES_MAX):
            if status == 0 or not again(status):
                break
            await self._sleep(max(backoff.next(), after_s))
            status, content, after_s = await self._attempt(letter, url)
        return status, content

    async def _attempt(self, letter: Letter, url: str) -> tuple[int, bytes, float]:
        """(0 if it is done, else the status or -1; the answer; the Retry-After seconds)."""
        try:
            async with self._client.post(
                url, data=letter.body, headers=letter.headers, timeout=_TIMEOUT, allow_redirects=False
            ) as answer:
                content = await answer.content.read(limits.event_bytes_max + 1)
                if not 200 <= answer.status < 300:
                    return answer.status, content, _seconds(answer.headers.get("Retry-After", ""))
                headers = {name.lower(): value for name, value in answer.headers.items()}
        except (aiohttp.ClientError, TimeoutError) as error:
            return -1, (str(error) or type(error).__name__).encode(), 0.0
        if not content and "ce-type" not in headers:
            return 0, b"", 0.0
        try:
            answered = Letter(*cloudevents.as_binary(headers, content))
        except UserError as error:
            return 502, f"a reply that is no CloudEvent: {error}".encode(), 0.0
        if letter.hops_left <= 1:
            log.warning("a chain of replies is too long: its last event is dropped", **_names(answered))
            return 0, b"", 0.0
        try:
            await self._reply(answered.with_hops(letter.hops_left - 1))
        except TooMany as error:  # as Knative: a reply that cannot be taken is an attempt that failed
            return 503, str(error).encode(), 0.0
        return 0, b"", 0.0

    async def _dead_letter(self, letter: Letter, url: str, status: int, content: bytes) -> None:
        reason = content[:_ERROR_CHARS_MAX].decode(errors="replace")
        log.warning("dead letter", to=url, status=status, reason=reason[:200], **_names(letter))
        extensions = {
            "ce-knativeerrordest": url,
            "ce-knativeerrorcode": str(status),
            "ce-knativeerrordata": reason.encode("unicode_escape").decode("ascii")[:_ERROR_CHARS_MAX],
        }
        dead = Letter({**letter.headers, **extensions}, letter.body)
        status, content = await self._try(dead, self._dead_url, lambda _: True)
        if status:
            reason = content[:200].decode(errors="replace")
            log.error("a dead letter is lost", status=status, reason=reason, **_names(letter))


def _seconds(text: str) -> float:
    """Seconds of a Retry-After header; dates are ignored."""
    return float(min(int(text), 600)) if text.isdecimal() and len(text) < 9 else 0.0


def _names(letter: Letter) -> dict[str, str]:
    attributes = letter.attributes
    return {name: attributes.get(name, "")[:200] for name in ("type", "subject", "id")}
