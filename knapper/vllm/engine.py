"""The core that is there now: made on first use, made again when it ended, put to rest when nobody needs it."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import structlog

from knapper.concurrency.retry import Attempts
from knapper.errors import KnapperError, Unavailable
from knapper.vllm.core import Adapter, Core, CoreEnded, abandon_start

_ABANDON_EVERY_S: Final = 0.2  # a start that has no process yet has one a moment later

log = structlog.get_logger()


class CoreLifecycle:
    """`start` blocks until a core can sample. `rest_s`: after so long without a sample memory is given back; 0: never.

    On one GPU, that is how train_step and sample take turns.
    """

    def __init__(self, start: Callable[[], Core], rest_s: float, attempts: Attempts | None = None) -> None:
        self._start, self._rest_s = start, rest_s
        self._attempts = attempts or Attempts("vLLM", time.monotonic)  # noqa: TID251  when to try again, no more
        self._core: Core | None = None
        self._loaded: dict[int, asyncio.Future[None]] = {}  # adapters of this core, by number
        self._mended: Core | None = None
        self._waking: asyncio.Future[Core] | None = None
        self._asleep = False
        self._starting = self._leaving = False
        self._users = 0
        self._rest: asyncio.TimerHandle | None = None
        self._resting: asyncio.Task[None] | None = None
        self.starts = 0

    def begin(self) -> None:
        """Blocks. Before the port binds, so that the first sample finds a core; if none starts, it hears why."""
        with suppress(Unavailable):
            self._core = self._another()
        with suppress(RuntimeError):  # there is no event loop on a thread of its own: then the first sample does it
            self._rest_soon()

    @property
    def core(self) -> Core | None:
        return self._core

    @property
    def resting(self) -> bool:
        return self._asleep or self._core is None

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Core]:
        """A core that is awake, and stays so. Raises Unavailable while none can be had."""
        self._users += 1
        if self._rest is not None:
            self._rest.cancel()
        try:
            core = await self._ready()
            yield core
        except CoreEnded:
            log.warning("vllm: the engine core ended; another starts")
            if self._waking is None and self._core is not None and self._core.ended:
                asyncio.ensure_future(self._ready()).add_done_callback(_heard)
            raise
        finally:
            self._users -= 1
            self._rest_soon()

    async def load(self, core: Core, adapter: Adapter) -> None:
        """Once a core, however many ask."""
        loading = self._loaded.get(adapter.number)
        if loading is None:
            loading = self._loaded[adapter.number] = asyncio.ensure_future(core.load(adapter))
        try:
            await asyncio.shield(loading)
        except KnapperError:
            if self._loaded.get(adapter.number) is loading:
                del self._loaded[adapter.number]
            raise

    async def forget(self, adapter: Adapter) -> None:
        if self._loaded.pop(adapter.number, None) is not None and self._core is not None:
            with suppress(KnapperError):
                await self._core.forget(adapter)

    async def rest(self) -> None:
        """Give the memory back, unless somebody samples: asleep where vLLM can, else ended."""
        if self._users or self._core is None or self._asleep:
            return
        core = self._core
        try:
            if not core.ended and await core.sleep():
                self._asleep = True
                log.info("vllm: asleep")
                return
        except CoreEnded:
            pass  # then it has nothing to give back
        self._core = self._mended = None
        self._loaded = {}
        await asyncio.to_thread(core.close)
        log.info("vllm: ended, to give its memory back")

    def leave(self) -> None:
        """This process ends: no other core starts, and one that only starts is given up. For signal handlers too."""
        self._leaving = True
        threading.Thread(target=self._abandon, name="vllm: give up a start", daemon=True).start()

    def close(self) -> None:
        core, self._core = self._core, None
        if core is not None:
            core.close()

    def _abandon(self) -> None:
        pause = threading.Event()
        while self._starting:
            abandon_start()
            pause.wait(_ABANDON_EVERY_S)

    def _another(self) -> Core:
        """Blocks. Raises Unavailable."""
        self._starting, began = True, self._attempts.now()
        try:
            if self._leaving:
                raise Unavailable("this vLLM sampler ends", retry_after_s=1.0)
            core = self._start()
        except KnapperError as error:
            if not self._leaving:
                self._attempts.failed(str(error), self._attempts.now() - began)
            raise
        finally:
            self._starting = False
        self._attempts.succeeded()
        self.starts += 1
        return core

    def _rest_soon(self) -> None:
        if self._rest_s and not self._users:
            self._rest = asyncio.get_running_loop().call_later(self._rest_s, self._tire)

    def _tire(self) -> None:
        self._resting = asyncio.ensure_future(self.rest())

    async def _ready(self) -> Core:
        if self._resting is not None:
            await asyncio.wait([self._resting])
        core = self._core
        if core is not None and core is self._mended and not core.ended and not self._asleep:
            return core
        if self._attempts.reason and self._waking is None and not self._attempts.due:
            raise self._attempts.refusal()
        if self._waking is None:
            self._waking = asyncio.ensure_future(self._wake())
            self._waking.add_done_callback(lambda _: setattr(self, "_waking", None))
            self._waking.add_done_callback(_heard)
        if self._attempts.reason:  # another attempt goes on beside this answer
            raise self._attempts.refusal()
        return await asyncio.shield(self._waking)

    async def _wake(self) -> Core:
        core, self._asleep = self._core, False
        if core is not None and not core.ended:
            if self._mended is core:
                await core.wake()
            else:
                await core.mend()
                self._mended = core
            return core
        self._core, self._loaded = None, {}
        if core is not None:
            await asyncio.to_thread(core.close)
        self._core = await asyncio.to_thread(self._another)
        await self._core.mend()
        self._mended = self._core
        log.info("vllm: ready")
        return self._core


def _heard(started: "asyncio.Future[Core]") -> None:
    if not started.cancelled() and (error := started.exception()) is not None:
        log.debug("vllm: no core could be started; a sample tries again", reason=str(error))
