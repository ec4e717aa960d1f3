"""Ends an idle process.

The supervisor holds its socket, so no request is refused: one that comes too late is served by the next process.
"""

import asyncio
import signal

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_FIRST_S = 5.0  # at least, for the request that started the process
_DRAIN_S = 60  # to exit, after the last response

log = structlog.get_logger()


class IdleTimeout:
    """Wraps an application: ends the process by SIGTERM after `idle_s` without a request under way.

    The server then stops accepting, and answers the requests it has accepted.
    """

    def __init__(self, application: ASGIApp, idle_s: float) -> None:
        self._application = application
        self._idle_s = idle_s
        self._under_way = 0
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, self._arm_on_startup(send))
            return
        self._under_way += 1
        self._disarm()
        try:
            await self._application(scope, receive, send)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._arm(self._idle_s)

    def _arm_on_startup(self, send: Send) -> Send:
        async def forward(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                self._arm(max(self._idle_s, _FIRST_S))

        return forward

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
        signal.alarm(_DRAIN_S)  # SIGALRM ends a process that hangs while exiting
        signal.raise_signal(signal.SIGTERM)
