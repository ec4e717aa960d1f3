"""A process that exists only while it is needed: started by the first caller, ended by idleness or a crash.

The supervisor holds its listening socket, and never accepts from it: while no process runs, callers wait in the
kernel's queue, and are not refused. A waiting caller starts the process, which ends itself when idle (see
knapper/serving/idle.py); callers in between wait for the next one.
"""

import asyncio
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import structlog

from knapper import limits
from knapper.errors import Unavailable, Unservable
from knapper.local import web
from knapper.local.process import Process
from knapper.local.refusal import refuse
from knapper.web.backoff import Backoff
from knapper.web.sockets import readable

log = structlog.get_logger()

Changed = Callable[[str, Process | None, bool], None]  # name, what runs now, whether it has accepted anybody

stop_grace_s = 10.0
_backoff_s_max = 30.0
_PATIENCE = 3  # failures in a row that may be temporary
_START_POLL_S, _POLL_S = 0.02, 1.0
_BY_ITSELF = ("exit code 0", "killed by SIGTERM")  # uvicorn ends by the signal that it handled


class Service:
    """Scale to zero and back, for one process. `application` is served from `directory`; see `web.start`."""

    def __init__(
        self,
        name: str,
        application: str,
        directory: Path,
        environment: Mapping[str, str],
        listener: socket.socket,
        changed: Changed,
    ) -> None:
        self.name = name
        self._application = application
        self._directory = directory
        self._environment = environment
        self._listener = listener
        self._changed = changed
        self._process: Process | None = None
        self._up = False
        self._backoff = Backoff(1.0, _backoff_s_max)  # between starts that fail
        self._reason = ""  # of the newest of them

    async def keep(self) -> NoReturn:
        """Run it whenever somebody waits for it, until cancelled."""
        self._listener.listen(web.BACKLOG)
        while True:
            await self._until_called()
            try:
                await self._run()
            except Unavailable as error:
                await refuse(self._listener, error)

    async def stop(self) -> None:
        """End what `keep` left when it was cancelled; at once, if it has done nothing yet that it could finish."""
        if self._process:
            await self._process.stop(stop_grace_s if self._up else 0)

    def kill(self) -> None:
        if self._process:
            self._process.kill()

    async def _until_called(self) -> None:
        loop, called = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._listener, called.set)
        try:
            await called.wait()
        finally:
            loop.remove_reader(self._listener)

    async def _run(self) -> None:
        """One process, from start to end. Raises Unavailable if it ended before it accepted anybody, or hung."""
        log.info(f"{self.name}: starting")
        self._up = False
        try:
            process = await web.start(self._application, self._directory, self._environment, self._listener)
        except OSError as error:
            raise self._failed(f"did not start: {error}") from error
        self._process = process
        self._changed(self.name, process, False)
        hung = await self._watch(process)
        ending = await process.ending()
        self._changed(self.name, None, False)
        if hung:
            raise self._failed(f"hung: it accepted no call for {limits.start_s_max:.0f} s")
        if not self._up:
            raise self._failed(f"did not start: {ending}; its last lines:\n{await process.last_words()}")
        if ending not in _BY_ITSELF:
            log.error(f"{self.name}: ended ({ending}); the next call starts it again", pid=process.pid)

    async def _watch(self, process: Process) -> bool:
        """Until it has ended. True if it had to be: somebody waited too long for it to accept."""
        loop = asyncio.get_running_loop()
        began = heard = loop.time()
        while True:
            if not readable(self._listener.fileno()):
                heard = loop.time()
                if not self._up:
                    self._came_up(process, heard - began)
            if process.exited.done():
                return False
            if loop.time() - heard > limits.start_s_max:
                await process.stop(grace_s=1)
                return True
            await asyncio.wait([process.exited], timeout=_POLL_S if self._up else _START_POLL_S)

    def _came_up(self, process: Process, took_s: float) -> None:
        log.info(f"{self.name}: ready after {took_s:.1f} s", pid=process.pid)
        self._up, self._reason = True, ""
        self._backoff.reset()
        self._changed(self.name, process, True)

    def _failed(self, reason: str) -> Unavailable:
        """Callers are told the same words each time; the log, when they are news."""
        if reason != self._reason:
            log.error(f"{self.name}: {reason}")
        self._reason = reason
        backoff_s = self._backoff.next()
        said = f"{self.name} {reason.partition(';')[0]} (see the log)"
        if self._backoff.failures < _PATIENCE:
            return Unavailable(f"{said}; the next attempt is in {backoff_s:.0f} s", backoff_s)
        return Unservable(f"{said}, {_PATIENCE} times or more; it is tried again by itself", backoff_s)
