"""The life of the core: started on first use, restarted after it ended, released when idle."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol

import structlog

from knapper.concurrency.retry import Attempts
from knapper.errors import KnapperError, Unavailable
from knapper.vllm.core import Adapter, Core, CoreEnded, abandon_start

_ABANDON_EVERY_S: Final = 0.2  # a start without a process may have one a moment later

log = structlog.get_logger()


class Neighbour(Protocol):
    """The other user of the card."""

    async def lend(self) -> None:
        """The core has released its memory: it may be used."""

    async def reclaim(self) -> None:
        """The core is about to take its memory, which is free when this returns."""


class CoreLifecycle:
    """`start` blocks until a core can sample. `idle_s`: idle time after which memory is released; 0: never.

    On one GPU, that is how train_step and sample take turns; `neighbour` is told, if it is in this process.
    """

    def __init__(
        self,
        start: Callable[[], Core],
        idle_s: float,
        attempts: Attempts | None = None,
        neighbour: Neighbour | None = None,
    ) -> None:
        self._start, self._idle_s, self._neighbour = start, idle_s, neighbour
        self._attempts = attempts or Attempts("vLLM", time.monotonic)  # noqa: TID251  only times retries
        self._core: Core | None = None
        self._loaded: dict[int, asyncio.Future[None]] = {}  # adapters of this core, by number
        self._patched: Core | None = None
        self._waking: asyncio.Future[Core] | None = None
        self._asleep = False
        self._starting = self._shutting_down = False
        self._users = 0
        self._release_timer: asyncio.TimerHandle | None = None
        self._releasing: asyncio.Task[None] | None = None
        self.starts = 0

    def begin(self) -> None:
        """Blocks. Called before the port binds: the first sample finds a core, or why none started."""
        with suppress(Unavailable):
            self._core = self._start_core()
        with suppress(RuntimeError):  # without an event loop on this thread the first sample schedules it
            self._schedule_release()

    @property
    def core(self) -> Core | None:
        return self._core

    @property
    def released(self) -> bool:
        return self._asleep or self._core is None

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Core]:
        """A core that is awake, and stays awake. Raises Unavailable if there is none."""
        self._users += 1
        if self._release_timer is not None:
            self._release_timer.cancel()
        try:
            core = await self._ready()
            yield core
        except CoreEnded:
            log.warning("vllm: the engine core ended; another starts")
            if self._waking is None and self._core is not None and self._core.ended:
                asyncio.ensure_future(self._ready()).add_done_callback(_log_failure)
            raise
        finally:
            self._users -= 1
            self._schedule_release()

    async def load(self, core: Core, adapter: Adapter) -> None:
        """Load an adapter, once for each core."""
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

    async def release(self) -> None:
        """Release the memory unless a sample is active: by sleep where vLLM can, else by ending the core."""
        if self._users or self._core is None or self._asleep:
            return
        core = self._core
        try:
            if not core.ended and await core.sleep():
                self._asleep = True
                log.info("vllm: asleep")
                if self._neighbour is not None:
                    await self._neighbour.lend()
                return
        except CoreEnded:
            pass  # an ended core has released it
        self._core = self._patched = None
        self._loaded = {}
        await asyncio.to_thread(core.close)
        log.info("vllm: ended, to give its memory back")

    def shut_down(self) -> None:
        """This process ends: start no other core, and abandon a start. Safe in signal handlers."""
        self._shutting_down = True
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

    def _start_core(self) -> Core:
        """Blocks. Raises Unavailable."""
        self._starting, began = True, self._attempts.now()
        try:
            if self._shutting_down:
                raise Unavailable("this vLLM sampler ends", retry_after_s=1.0)
            core = self._start()
        except KnapperError as error:
            if not self._shutting_down:
                self._attempts.failed(str(error), self._attempts.now() - began)
            raise
        finally:
            self._starting = False
        self._attempts.succeeded()
        self.starts += 1
        return core

    def _schedule_release(self) -> None:
        if self._idle_s and not self._users:
            self._release_timer = asyncio.get_running_loop().call_later(self._idle_s, self._start_release)

    def _start_release(self) -> None:
        self._releasing = asyncio.ensure_future(self.release())

    async def _ready(self) -> Core:
        if self._releasing is not None:
            await asyncio.wait([self._releasing])
        core = self._core
        if core is not None and core is self._patched and not core.ended and not self._asleep:
            return core
        if self._attempts.reason and self._waking is None and not self._attempts.due:
            raise self._attempts.refusal()
        if self._waking is None:
            self._waking = asyncio.ensure_future(self._wake())
            self._waking.add_done_callback(lambda _: setattr(self, "_waking", None))
            self._waking.add_done_callback(_log_failure)
        if self._attempts.reason:  # the next attempt goes on in the background
            raise self._attempts.refusal()
        return await asyncio.shield(self._waking)

    async def _wake(self) -> Core:
        if self._asleep and self._neighbour is not None:
            await self._neighbour.reclaim()
        core, asleep, self._asleep = self._core, self._asleep, False
        if core is not None and not core.ended:
            if asleep:
                await core.wake()
            if self._patched is not core:  # its first sample
                await core.patch()
                self._patched = core
            return core
        self._core, self._loaded = None, {}
        if core is not None:
            await asyncio.to_thread(core.close)
        self._core = await asyncio.to_thread(self._start_core)
        await self._core.patch()
        self._patched = self._core
        log.info("vllm: ready")
        return self._core


def _log_failure(started: "asyncio.Future[Core]") -> None:
    if not started.cancelled() and (error := started.exception()) is not None:
        log.debug("vllm: no core could be started; a sample tries again", reason=str(error))
