"""A process that exists only while it is needed: started by the first request, ended by idleness or a crash."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Literal

import structlog

from knapper.errors import Unavailable, Unservable
from knapper.local import web
from knapper.local.process import Process
from knapper.web.backoff import Backoff

log = structlog.get_logger()

Launch = Callable[[socket.socket], Awaitable[Process]]
Changed = Callable[[str, "Running | None"], None]  # name, what runs now

start_s_max = 600.0  # a large model on a slow disk
stop_grace_s = 10.0
_backoff_s_max = 30.0
_PATIENCE = 3  # failures in a row that may be a moment's


@dataclass(frozen=True)
class Running:
    process: Process
    port: int
    ready: bool = False  # it answers; before, it loads

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Service:
    """Scale to zero and back, for one process.

    `launch` starts it on a socket; `changed` hears of starts, of the first answer, and of ends.
    """

    def __init__(self, name: str, launch: Launch, idle_s: float, changed: Changed) -> None:
        self.name = name
        self._launch = launch
        self._idle_s = idle_s
        self._changed = changed
        self._running: Running | None = None
        self._starting: asyncio.Task[Running] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._in_flight = 0
        self._backoff = Backoff(1.0, _backoff_s_max)  # between starts that fail
        self._reason = ""  # of the newest of them
        self._not_before = 0.0  # loop time

    @property
    def state(self) -> Literal["stopped", "starting", "running"]:
        if self._running:
            return "running"
        return "starting" if self._starting and not self._starting.done() else "stopped"

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Running]:
        """The running process, started if it must be; it is not stopped for idleness inside. Raises Unavailable."""
        self._in_flight += 1
        self._cancel_timer()
        try:
            yield self._running or await self._start_once()
        finally:
            self._in_flight -= 1
            self._stop_when_idle()

    async def lost(self, running: Running) -> None:
        """A request could not be delivered: if the process is ending, wait a moment until that is known."""
        if self._running is running and self._watching:
            await asyncio.wait([self._watching], timeout=1)

    async def close(self) -> None:
        """Stop the process for good."""
        self._cancel_timer()
        if self._starting and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._running:
            await self._stop(self._running)
        elif self._stopping:
            await asyncio.shield(self._stopping)

    def kill(self) -> None:
        if self._running:
            self._running.process.kill()

    async def _start_once(self) -> Running:
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(lambda task: task.cancelled() or task.exception())  # heard, if all left
        return await asyncio.shield(self._starting)  # it goes on when its first client leaves

    async def _start(self) -> Running:
        if self._stopping:
            await asyncio.shield(self._stopping)
        loop = asyncio.get_running_loop()
        if (wait_s := self._not_before - loop.time()) > 0:
            raise self._refusal(wait_s)
        log.info(f"{self.name}: starting")
        began = loop.time()
        try:
            with web.bind("127.0.0.1", 0) as listener:
                port = listener.getsockname()[1]
                process = await self._launch(listener)
        except OSError as error:
            raise self._failed(str(error)) from error
        running = Running(process, port)  # from here on only the process holds the socket
        self._changed(self.name, running)
        try:
            ready = await web.answers(process, port, start_s_max)
        except TimeoutError:
            await process.stop(grace_s=1)
            raise self._failed(f"no answer within {start_s_max:.0f} s") from None
        except asyncio.CancelledError:
            await process.stop(grace_s=0)  # it has done nothing yet that it could finish
            self._changed(self.name, None)
            raise
        if not ready:
            ending, words = await process.ending(), await process.last_words()
            raise self._failed(f"{ending}; its last lines:\n{words}")
        log.info(f"{self.name}: ready after {loop.time() - began:.1f} s", pid=process.pid, port=port)
        self._backoff.reset()
        self._reason = ""
        running = self._running = replace(running, ready=True)
        self._changed(self.name, running)
        self._watching = asyncio.create_task(self._watch(running))
        self._stop_when_idle()  # if everybody left meanwhile
        return running

    def _failed(self, reason: str) -> Unavailable:
        self._changed(self.name, None)
        backoff_s = self._backoff.next()
        self._not_before = asyncio.get_running_loop().time() + backoff_s
        if reason != self._reason:  # once: the same again is no news
            log.error(f"{self.name}: did not start: {reason}")
        self._reason = reason
        return self._refusal(backoff_s)

    def _refusal(self, wait_s: float) -> Unavailable:
        """Soon it says so to whoever waits, in the same words each time: a process that ends cannot say it itself."""
        said = f"{self.name} did not start: {self._reason.partition(';')[0]} (see the log)"
        if self._backoff.failures < _PATIENCE:
            return Unavailable(f"{said}; the next attempt is in {wait_s:.0f} s", wait_s)
        return Unservable(f"{said}, {_PATIENCE} times or more; it is tried again by itself", wait_s)

    async def _watch(self, running: Running) -> None:
        ending = await running.process.ending()
        if self._running is running:
            log.error(f"{self.name}: ended ({ending}); the next request starts it again", pid=running.process.pid)
            self._running = None
            self._changed(self.name, None)

    def _stop_when_idle(self) -> None:
        self._cancel_timer()
        if self._running and not self._in_flight:
            self._timer = asyncio.get_running_loop().call_later(self._idle_s, self._scale_to_zero, self._running)

    def _scale_to_zero(self, running: Running) -> None:
        if self._running is running:
            log.info(f"{self.name}: idle for {self._idle_s:g} s, scaled to zero", pid=running.process.pid)
            self._stopping = asyncio.create_task(self._stop(running))

    async def _stop(self, running: Running) -> None:
        self._running = None
        await running.process.stop(stop_grace_s)
        self._changed(self.name, None)

    def _cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
