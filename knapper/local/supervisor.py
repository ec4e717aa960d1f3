"""`knapper up`: gateway and broker always, functions while there is work; all end together.

supervisor                  holds every listening socket, and accepts from none
 ├─ gateway                what clients call
 ├─ broker                 delivers events, and watches the inbox
 ├─ engine                 of each base model: train_step and sample in one process, or one for each (--isolated)
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
from knapper.local.base_model import all_chosen
from knapper.local.process import Process
from knapper.local.state import ProcessTable, locked
from knapper.settings import Settings
from knapper.store.factory import open_store
from knapper.text.printable import say

log = structlog.get_logger()


def up(
    settings: Settings, root: Path, environ: Mapping[str, str], models: Sequence[str], *, isolated: bool = False
) -> None:
    """Serve these base models until SIGINT or SIGTERM. `root` holds gateway/ and functions/.

    Raises KnapperError if that cannot begin.
    """
    os.umask(0o077)  # of every process below: what they write is for this account alone
    settings.expect_keys_beyond_loopback()
    expect_subscribable(settings)
    _allow_many_connections()
    with ExitStack() as stack:
        stack.enter_context(locked(settings.data, settings.run_directory))
        listeners = {"gateway": stack.enter_context(web.bind(settings.host, settings.port))}
        for name in ("broker", "reward"):
            listeners[name] = stack.enter_context(web.bind("127.0.0.1", 0))
        for died in settings.run_directory.glob("loading-*"):  # under an earlier server
            died.unlink(missing_ok=True)
        settings = msgspec.structs.replace(
            settings,
            reward_url=engines.urls(engines.REWARD, listeners)["reward"],
            broker_url=f"{web.url(listeners['broker'])}/",
            gateway_url=f"http://127.0.0.1:{listeners['gateway'].getsockname()[1]}",
        )
        layout = engines.ISOLATED if isolated else engines.SHARED
        served = [engines.Engine.bind(each, layout, stack) for each in all_chosen(settings, environ, models)]
        asyncio.run(Supervisor(served[0].settings, root, environ, served, listeners).serve())


class Supervisor:
    """Every process of one `knapper up`. Lives on the main thread, whose end would end the children."""

    def __init__(
        self,
        settings: Settings,
        root: Path,
        environ: Mapping[str, str],
        served: Sequence[engines.Engine],
        listeners: Mapping[str, socket.socket],
    ) -> None:
        outer = {name: value for name, value in environ.items() if not name.startswith("KNAPPER_")}
        outer["PYTHONUNBUFFERED"] = "1"
        environment = outer | settings.environment()
        package = Path(knapper.__file__).parent.parent
        self._settings = settings
        self._processes = ProcessTable(settings.run_directory)
        self._served = served
        self._ports = engines.ports([listeners, *(each.listeners for each in served)])
        self._gateway = AlwaysOn(
            "gateway", "gateway.app:app", root, environment, listeners["gateway"], "/api/v1/healthz", self._changed
        )
        self._broker = AlwaysOn(
            "broker", "knapper.local.broker.main:app", package, environment, listeners["broker"], "/", self._changed
        )
        self._services = engines.services(engines.REWARD, root, environment, listeners, self._changed)
        for each in served:
            own = outer | each.settings.environment()
            self._services += engines.services(each.layout, root, own, each.listeners, self._changed)
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
        records = [each.record() for each in self._served]
        await Catalogue(self._store).serve_exactly(records)
        await FunctionKey(self._store, lambda: token_hex(16)).headers()  # made before anybody needs it
        await self._gateway.keep(lambda: self._say(banner(self._settings, records, self._gateway.url)))

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
