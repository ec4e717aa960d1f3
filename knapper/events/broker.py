"""Posts events to the Broker. Losing one is harmless: the periodic tick sends the doorbell again."""

from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from knapper.errors import Unavailable
from knapper.events.cloudevents import Event
from knapper.events.function_key import FunctionKey
from knapper.observability import traces

if TYPE_CHECKING:
    import aiohttp

_TIMEOUT_S = 3.0  # a Broker answers at once; one that delivers first is not waited for

log = structlog.get_logger()


class Broker:
    """The Broker at `url`. Empty: there is none, and the tick finds pending work. `key` signs the events."""

    def __init__(self, url: str, key: FunctionKey) -> None:
        self._url, self._key = url, key

    async def post(self, event: Event) -> bool:
        """True if the Broker accepted the event; otherwise it may still have been delivered."""
        if not self._url:
            return False
        import aiohttp  # here, so that a process that posts nothing starts faster

        try:
            signed = await self._key.sign(event)
            headers, body = replace(signed, traceparent=traces.current(event.traceparent)).encode()
            async with (
                _client() as client,  # one an event: events are rare, and nothing is left open at exit
                client.post(self._url, data=body, headers=headers, allow_redirects=False) as response,
            ):
                if response.status < 300:
                    return True
                reason = f"{response.status}: {(await response.text())[:200]}"
        except (aiohttp.ClientError, TimeoutError, Unavailable) as error:
            reason = str(error) or type(error).__name__
        log.info("the broker did not take an event", type=event.type, subject=event.subject, reason=reason)
        return False


def _client() -> "aiohttp.ClientSession":
    import aiohttp

    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S), cookie_jar=aiohttp.DummyCookieJar())
