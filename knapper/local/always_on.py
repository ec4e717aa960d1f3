"""A process that always runs: restarted at once when it ends, on the same listening socket."""

import asyncio
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import httpx
import structlog

from knapper.errors import Unavailable
from knapper.local import web
from knapper.local.on_demand import Changed
from knapper.local.process import Process
from knapper.web.backoff import Backoff

log = structlog.get_logger()

_healthy_s_max = 120.0
_grace_s = 2.0  # the gateway may hold polls for half a minute; clients repeat them
_steady_s = 5.0  # a process that lived this long is restarted without delay
_backoff_s, _backoff_s_max = 0.1, 5.0


class AlwaysOn:
    """The supervisor holds the listening socket: while no process runs, clients wait in it, and are not refused.

    Serves `application` from `directory`; it is up when a GET of `health` succeeds.
    """

    def __init__(
        self,
        name: str,
        application: str,
        directory: Path,
        environment: Mapping[str, str],
        listener: socket.socket,
        health: str,
        changed: Changed,
    ) -> None:
        self.name = name
        self._application = application
        self._directory = directory
        self._environment = environment
        self._listener = listener
        self._health = health
        self._changed = changed
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """Its URL on this machine."""
        return web.url(self._listener)

    async def keep(self, ready: Callable[[], None] = lambda: None) -> NoReturn:
        """Run it until cancelled; `ready` is called once. Raises Unavailable if the first start fails."""
        loop = asyncio.get_running_loop()
        self._listener.listen(web.BACKLOG)
        served, backoff = False, Backoff(_backoff_s, _backoff_s_max)
        while True:
            began = loop.time()
            self._process = await web.start(self._application, self._directory, self._environment, self._listener)
            self._changed(self.name, self._process, True)
            if not served:
                await self._until_healthy(self._process)
                served = True
                ready()
            ending = await self._process.ending()
            steady = loop.time() - began >= _steady_s
            log.error(f"{self.name}: ended ({ending}); starting it again", pid=self._process.pid)
            if steady:
                backoff.reset()
            else:
                await asyncio.sleep(backoff.next())

    async def stop(self) -> None:
        if self._process:
            await self._process.stop(_grace_s)

    def kill(self) -> None:
        if self._process:
            self._process.kill()

    async def _until_healthy(self, process: Process) -> None:
        health_check = asyncio.create_task(self._ask_health())
        await asyncio.wait([health_check, process.exited], return_when=asyncio.FIRST_COMPLETED)
        if health_check.done():
            health_check.result()
            return
        health_check.cancel()
        raise Unavailable(
            f"the {self.name} did not start ({await process.ending()}); its last lines:\n{await process.last_words()}"
        )

    async def _ask_health(self) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=_healthy_s_max) as client:
            try:
                answer = await client.get(f"{self.url}{self._health}")
            except httpx.HTTPError as error:
                raise Unavailable(
                    f"the {self.name} does not answer on {self.url}: {type(error).__name__} {error}"
                ) from error
        if not answer.is_success:
            raise Unavailable(f"the {self.name} answers {answer.status_code} to {self._health}: {answer.text[:200]}")
