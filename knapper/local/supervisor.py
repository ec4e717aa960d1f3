"""`knapper up`: gateway and broker always, functions while there is work; all end together.

supervisor                  holds every listening socket, and accepts from none
 ├─ gateway                what clients call
 ├─ broker                 delivers events, and watches the inbox
 ├─ engine                 train_step and sample in one process, or a process for each (--isolated)
 └─ reward                 without the base model; it starts a process for each run of somebody's code
"""

import asyncio
import os
import resource
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from secrets import token_hex

import msgspec
import structlog

import knapper
from knapper.catalogue.served_models import Catalogue
from knapper.events.function_key import FunctionKey
from knapper.exchange.factory import expect_subscribable
from knapper.local import engines, web
from knapper.local.always_on import AlwaysOn
from knapper.local.banner import banner
from knapper.local.base_model import chosen, served
from knapper.local.process import Process
from knapper.local.state import ProcessTable, locked
from knapper.settings import Settings
from knapper.store.factory import open_store
from knapper.text.printable import say

log = structlog.get_logger()


def up(settings: Settings, root: Path, environ: Mapping[str, str], *, isolated: bool = False) -> None:
    """Serve until SIGINT or SIGTERM. Raises KnapperError if that cannot begin; `root` holds gateway/ and functions/."""
    os.umask(0o077)  # of every process below: what they write is for this account alone
    settings.expect_keys_beyond_loopback()
    expect_subscribable(settings)
    _allow_many_connections()
    with ExitStack() as stack:
        stack.enter_context(locked(settings.data, settings.run_directory))
        layout = engines.ISOLATED if isolated else engines.SHARED
        listeners = {"gateway": stack.enter_context(web.bind(settings.host, settings.port))}
        for name in ("broker", *layout):
            listeners[name] = stack.enter_context(web.bind("127.0.0.1", 0))
        for died in settings.run_directory.glob("loading-*"):  # under an earlier server
            died.unlink(missing_ok=True)
        settings = chosen(settings, environ)
        urls = engines.urls(layout, listeners)
        settings = msgspec.structs.replace(
            settings,
            train_step_url=urls["train_step"],
            sample_url=urls["sample"],
            reward_url=urls["reward"],
            broker_url=f"{web.url(listeners['broker'])}/",
            gateway_url=f"http://127.0.0.1:{listeners['gateway'].getsockname()[1]}",
        )
        asyncio.run(Supervisor(settings, root, environ, layout, listeners).serve())


class Supervisor:
    """Every process of one `knapper up`. Lives on the main thread, whose end would end the children."""

    def __init__(
        self,
        settings: Settings,
        root: Path,
        environ: Mapping[str, str],
        layout: engines.Layout,
        listeners: Mapping[str, socket.socket],
    ) -> None:
        outer = {name: value for name, value in environ.items() if not name.startswith("KNAPPER_")}
        environment = {**outer, **settings.environment(), "PYTHONUNBUFFERED": "1"}
        package = Path(knapper.__file__).parent.parent
        self._settings = settings
        self._processes = ProcessTable(settings.run_directory)
        self._ports = {name: listener.getsockname()[1] for name, listener in listeners.items()}
        self._gateway = AlwaysOn(
            "gateway", "gateway.app:app", root, environment, listeners["gateway"], "/api/v1/healthz", self._changed
        )
        self._broker = AlwaysOn(
            "broker", "knapper.local.broker.main:app", package, environment, listeners["broker"], "/", self._changed
        )
        self._services = engines.services(layout, root, environment, listeners, self._changed)
        self._store = open_store(settings)
        self._stop = asyncio.Event()

    async def serve(self) -> None:
        """Bring everything up, keep it up until a signal, take it down: the gateway first, so that nobody calls."""
        self._heed_signals()
        self._processes.set("supervisor", os.getpid())
        works = [self._serve_gateway(), self._broker.keep(), *(service.keep() for service in self._services)]
        keeping = [asyncio.create_task(work) for work in works]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait([*keeping, stopping], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.wait(keeping)
            await asyncio.gather(self._gateway.stop(), self._broker.stop())
            await asyncio.gather(*(service.stop() for service in self._services))
            self._processes.clear()
        for task in keeping:
            if not task.cancelled():
                await task  # it ended by itself: with an error
        log.info("stopped")

    async def _serve_gateway(self) -> None:
        record = served(self._settings)
        await Catalogue(self._store).serve_only(record)
        await FunctionKey(self._store, lambda: token_hex(16)).headers()  # made before anybody needs it
        await self._gateway.keep(lambda: self._say(banner(self._settings, record, self._gateway.url)))

    @staticmethod
    def _say(lines: Sequence[str]) -> None:
        with suppress(BrokenPipeError):  # whoever only waited for the first line may have closed it by then
            say(*lines)

    def _heed_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stop.is_set():  # again: no more patience
            self._gateway.kill()
            self._broker.kill()
            for service in self._services:
                service.kill()
            return
        log.info(f"{number.name}: stopping (once more: at once)")
        self._stop.set()

    def _changed(self, name: str, process: Process | None, ready: bool) -> None:
        if process:
            self._processes.set(name, process.pid, self._ports[name], None if ready else time.time())
        else:
            self._processes.remove(name)


def _allow_many_connections() -> None:
    """Each sample that is waited for holds a connection in every process on its way; the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
