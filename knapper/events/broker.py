"""Post events to the Broker. It keeps nothing that matters: an event that gets lost is rung again by a tick."""

from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from knapper.errors import Unavailable
from knapper.events.cloudevents import Event
from knapper.events.function_key import FunctionKey
from knapper.observability import traces

if TYPE_CHECKING:
    import aiohttp

_TIMEOUT_S = 3.0  # a Broker answers at once; one whose channel delivers first is left to it

log = structlog.get_logger()


class Broker:
    """The Broker at `url`; empty: there is none, and whoever waits is found by the tick. `key` signs what it gets."""

    def __init__(self, url: str, key: FunctionKey) -> None:
        self._url, self._key = url, key

    async def post(self, event: Event) -> bool:
        """True if the Broker took the event. What became of one that it did not take is not known."""
        if not self._url:
            return False
        import aiohttp  # here: a process that posts nothing starts without it

        try:
            signed = await self._key.sign(event)
            headers, body = replace(signed, traceparent=traces.current(event.traceparent)).encode()
            async with (
                _client() as client,  # for this event alone: they are rare, and then nothing is left open at the end
                client.post(self._url, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                if answer.status < 300:
                    return True
                reason = f"{answer.status}: {(await answer.text())[:200]}"
        except (aiohttp.ClientError, TimeoutError, Unavailable) as error:
            reason = str(error) or type(error).__name__
        log.info("the broker did not take an event", type=event.type, subject=event.subject, reason=reason)
        return False


def _client() -> "aiohttp.ClientSession":
    import aiohttp

    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S), cookie_jar=aiohttp.DummyCookieJar())
