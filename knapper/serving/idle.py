"""A process that ends itself once nobody has called it for a while.

The supervisor holds its socket, so that nobody is refused: a caller that comes too late is served by the next process.
"""

import asyncio
import signal

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FIRST_S = 5.0  # for who woke the process, at least
_DRAIN_S = 60  # to end, after the last answer

log = structlog.get_logger()


class IdleTimeout:
    """The `application`, which ends by SIGTERM when `idle_s` have passed without a request under way.

    The server then stops accepting, and answers whatever it had accepted.
    """

    def __init__(self, application: ASGIApp, idle_s: float) -> None:
        self._application = application
        self._idle_s = idle_s
        self._under_way = 0
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, self._noting_start(send))
            return
        self._under_way += 1
        self._disarm()
        try:
            await self._application(scope, receive, send)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._arm(self._idle_s)

    def _noting_start(self, send: Send) -> Send:
        async def noted(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                self._arm(max(self._idle_s, _FIRST_S))

        return noted

    def _arm(self, after_s: float) -> None:
        if self._ending:
            signal.alarm(_DRAIN_S)
        else:
            self._timer = asyncio.get_running_loop().call_later(after_s, self._end)

    def _disarm(self) -> None:
        if self._ending:
            signal.alarm(0)
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        log.info(f"idle for {self._idle_s:g} s, scaled to zero")
        self._ending = True
        signal.alarm(_DRAIN_S)  # whose signal ends a process that hangs, whatever it hangs in
        signal.raise_signal(signal.SIGTERM)
