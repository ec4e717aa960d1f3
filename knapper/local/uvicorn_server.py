"""uvicorn inside our own event loop, leaving signals alone."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from knapper.local.web import KEEP_ALIVE_S, PROTOCOL


class Server(uvicorn.Server):
    """Serves an ASGI application on a bound socket from `start` to `stop`."""

    def __init__(self, application: Any, listener: socket.socket) -> None:
        # What goes wrong is logged by the application; uvicorn would add a line for each answer that breaks off.
        super().__init__(
            uvicorn.Config(
                application,
                http=PROTOCOL,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def start(self) -> None:
        self._task = asyncio.create_task(self.serve([self._listener]))

    async def stop(self) -> None:
        """End now: who still waits for an answer is cut off."""
        self.should_exit = self.force_exit = True
        if self._task:
            await self._task
