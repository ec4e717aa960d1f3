"""Worker processes that decode large bodies: decoding holds the interpreter's lock, and would block all requests.

A thread would not help: one call of a decoder written in C holds the lock throughout, for seconds if the body is large.
A worker reads the bytes and returns something compact. It has a memory limit, dies with this process, and starts with
the first body that is not small.
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
_NICE = 5  # with few cores, all else goes before large bodies
_LARGE_BYTES = 8 * limits.MIB  # one such body at a time: decoded, it takes up to fifteen times as much memory
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger()


class WorkerPool:
    """Decodes one body of a tenant at a time, so that no tenant occupies all workers."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._tenant_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._large = asyncio.Lock()

    async def run(
        self, tenant: str, work: Callable[Concatenate[bytes, P], T], body: bytes, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`work(body, *args)` in a worker. `work`, `args` and the result are pickled; the body is not.

        Raises what `work` raises, and TooLarge if the worker runs out of memory.
        """
        assert not kwargs, "workers take positional arguments only"
        async with self._tenant_locks.setdefault(tenant, asyncio.Lock()):
            if len(body) <= _LARGE_BYTES:
                return await self._try(work, body, *args)
            async with self._large:
                return await self._try(work, body, *args)

    async def in_thread(self, tenant: str, work: Callable[[], T]) -> T:
        """`work()` in a thread, for work that releases the interpreter's lock."""
        async with self._tenant_locks.setdefault(tenant, asyncio.Lock()):
            return await asyncio.to_thread(work)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _try(self, work: Callable[..., T], body: bytes, *args: object) -> T:
        size = len(body)
        for _ in range(2):  # another body may have killed the worker that they shared
            pool = self._pool = self._pool or _pool()
            try:
                return await _run(pool, work, body, *args)
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


async def _run(pool: ProcessPoolExecutor, work: Callable[..., T], body: bytes, *args: object) -> T:
    """A large body goes through a file in memory: pickling it would hold the interpreter's lock; writing does not."""
    execute = asyncio.get_running_loop().run_in_executor
    if sys.platform != "linux" or len(body) <= limits.MIB:
        return await execute(pool, work, body, *args)
    file = os.memfd_create("body")
    try:
        await asyncio.to_thread(_write, file, body)
        return await execute(pool, _read_and, work, f"/proc/{os.getpid()}/fd/{file}", *args)
    finally:
        os.close(file)


def _write(file: int, body: bytes) -> None:
    remaining = memoryview(body)
    while remaining:
        remaining = remaining[os.write(file, remaining) :]


def _read_and(work: Callable[..., T], path: str, *args: object) -> T:
    return work(Path(path).read_bytes(), *args)


def _pool() -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the event loop, and locks that threads hold
    return ProcessPoolExecutor(_PROCESSES, mp_context=spawn, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    """Initialise a worker: import what it needs, then limit the memory that it may take in addition."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
    os.nice(_NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    from gateway import body_decoders  # noqa: F401  loaded before memory is limited
    from gateway.openai import schemas  # noqa: F401  as above

    gc.freeze()
    gc.set_threshold(1_000_000)  # decoding makes millions of values and no cycles: collecting would find nothing
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limits.worker_memory_bytes,) * 2)
