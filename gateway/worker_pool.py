"""Processes for what grows with a request's body: decoding holds the interpreter's lock, and everybody would wait.

A thread is no help there: one call of a decoder written in C is one hold of the lock, for seconds where a body is
large. A worker reads the bytes, and answers what is compact. It has a limit of memory, dies with this process, and is
started by the first body that is not small.
"""

import asyncio
import ctypes
import gc
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import structlog

from knapper import limits
from knapper.errors import TooLarge

_PROCESSES = 2
_NICE = 5  # with few cores, everybody else goes before large bodies
_LARGE_BYTES = 8 * limits.MIB  # of these one at a time: decoded, they take up to fifteen times as much
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger()


class Workers:
    """Each tenant's bodies one after the other, so that no tenant has all processes for itself."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._large = asyncio.Lock()

    async def run(
        self, tenant: str, work: Callable[Concatenate[bytes, P], T], body: bytes, *given: P.args, **named: P.kwargs
    ) -> T:
        """What `work` returns there; it, what it is given and what it returns are pickled, but not the body.

        Raises what it raises, and TooLarge where the memory for it does not suffice.
        """
        assert not named, "what a worker does takes positions only"
        async with self._turns.setdefault(tenant, asyncio.Lock()):
            if len(body) <= _LARGE_BYTES:
                return await self._try(work, body, *given)
            async with self._large:
                return await self._try(work, body, *given)

    async def aside(self, tenant: str, work: Callable[[], T]) -> T:
        """What `work` returns in a thread, for what lets go of the lock."""
        async with self._turns.setdefault(tenant, asyncio.Lock()):
            return await asyncio.to_thread(work)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _try(self, work: Callable[..., T], body: bytes, *given: object) -> T:
        size = len(body)
        for _ in range(2):  # whose process died may have shared it with what killed it
            pool = self._pool = self._pool or _pool()
            try:
                return await _sent(pool, work, body, *given)
            except BrokenProcessPool as error:
                log.warning("a worker died", body_bytes=size, reason=str(error))
                if self._pool is pool:
                    self._pool = None
                pool.shutdown(wait=False)
            except MemoryError as error:
                log.info("a body takes too much memory", body_bytes=size, reason=str(error))
                break
        raise TooLarge(
            f"the request's body of {size} bytes takes more memory than {limits.worker_memory_bytes} bytes to decode; "
            "allowed: at most that; send less in one request"
        )


async def _sent(pool: ProcessPoolExecutor, work: Callable[..., T], body: bytes, *given: object) -> T:
    """A large body goes through a file in memory: to pickle it is one more hold of the lock, and writing is none."""
    run = asyncio.get_running_loop().run_in_executor
    if sys.platform != "linux" or len(body) <= limits.MIB:
        return await run(pool, work, body, *given)
    file = os.memfd_create("body")
    try:
        await asyncio.to_thread(_write, file, body)
        return await run(pool, _read_and, work, f"/proc/{os.getpid()}/fd/{file}", *given)
    finally:
        os.close(file)


def _write(file: int, body: bytes) -> None:
    rest = memoryview(body)
    while rest:
        rest = rest[os.write(file, rest) :]


def _read_and(work: Callable[..., T], path: str, *given: object) -> T:
    return work(Path(path).read_bytes(), *given)


def _pool() -> ProcessPoolExecutor:
    spawning = multiprocessing.get_context(
        "spawn"
    )  # a fork would inherit the event loop, and locks as threads hold them
    return ProcessPoolExecutor(_PROCESSES, mp_context=spawning, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    """In the worker, first: it imports what it will need, and then may take so much memory more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    os.nice(_NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for our parent, who ends us
    from gateway import body_decoders  # noqa: F401  loaded before memory is limited
    from gateway.openai import schemas  # noqa: F401  as above

    gc.freeze()
    gc.set_threshold(
        1_000_000
    )  # millions of values and no cycles: the collector would look through all again and again
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limits.worker_memory_bytes,) * 2)
