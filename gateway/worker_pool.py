"""Worker processes that decode large bodies: decoding holds the interpreter's lock, and would block all requests.

A thread would not help: one call of a decoder written in C holds the lock throughout, for seconds if the body is large.
A worker reads the bytes and returns something compact. It has a memory limit, dies with this process, and starts with
the first body that is not small. Bodies and results go through files in memory, and what goes through the pipes that
the workers share fits into these at once: whoever is killed in the middle of a message leaves its reader waiting for
the rest, and its writer for a reader, for ever.
"""

import asyncio
import gc
import multiprocessing
import os
import pickle  # noqa: TID251  as the pool itself does, between processes of our own
import resource
import signal
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

import structlog

from knapper import limits
from knapper.concurrency.parent import die_with
from knapper.errors import TooLarge

_PROCESSES = 2
_NICE = 5  # with few cores, all else goes before large bodies
_LARGE_BYTES = 8 * limits.MIB  # one such body at a time: decoded, it takes up to fifteen times as much memory

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
        """`work(body, *args)` in a worker. `work`, `args` (small ones) and the result are pickled; the body is not.

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
            self._pool.shutdown(wait=False)

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
    if sys.platform != "linux":
        return await _execute(pool, work, body, *args)
    given, returned = _Memory(), _Memory()
    await asyncio.to_thread(given.write, body)
    await _execute(pool, _between, given.shared, returned.shared, work, *args)
    result: T = await asyncio.to_thread(returned.unpickle)
    return result


async def _execute(pool: ProcessPoolExecutor, work: Callable[..., T], *args: object) -> T:
    """A caller that is cancelled leaves its call to end in the pool, soon, as its files are gone: where a call was
    cancelled, the thread that tells all others of a worker's death dies of it, and they wait for ever.
    """
    call = asyncio.get_running_loop().run_in_executor(pool, partial(work, *args))
    call.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # nobody may be left to be told
    return await asyncio.shield(call)


@dataclass(frozen=True)
class _Shared:
    """A file in another process's memory. Its descriptor may be another file's by the time that a worker opens it: of
    another call, and another tenant, where this one's caller has gone.
    """

    path: str
    inode: int

    def open(self, flags: int) -> int:
        """Raises OSError if it is gone."""
        file = os.open(self.path, flags)
        if os.fstat(file).st_ino != self.inode:
            os.close(file)
            raise FileNotFoundError(f"{self.path} is another file by now")
        return file


class _Memory:
    """A file in memory, as long as somebody has this object: a thread may be writing when its caller has gone, and a
    descriptor that was closed under it would be another tenant's file by then.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("knapper")
        weakref.finalize(self, os.close, self._file)
        self.shared = _Shared(f"/proc/{os.getpid()}/fd/{self._file}", os.fstat(self._file).st_ino)

    def write(self, content: bytes) -> None:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(self._file, remaining) :]

    def unpickle(self) -> Any:
        os.lseek(self._file, 0, os.SEEK_SET)
        with os.fdopen(self._file, "rb", closefd=False) as content:
            return pickle.load(content)  # noqa: S301  written by a process of our own


def _between(given: _Shared, returned: _Shared, work: Callable[..., object], *args: object) -> None:
    """In a worker: `work` of the content of one file, pickled into the other."""
    with os.fdopen(given.open(os.O_RDONLY), "rb") as file:
        body = file.read()
    result = work(body, *args)
    with os.fdopen(returned.open(os.O_WRONLY), "wb") as file:
        pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)


def _pool() -> ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit the event loop, and locks that threads hold
    return ProcessPoolExecutor(_PROCESSES, mp_context=spawn, initializer=_begin, initargs=(os.getpid(),))


def _begin(parent: int) -> None:
    """Initialise a worker: import what it needs, then limit the memory that it may take in addition."""
    die_with(parent)
    os.nice(_NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    from gateway import body_decoders  # noqa: F401  loaded before memory is limited
    from gateway.openai import schemas  # noqa: F401  as above

    gc.freeze()
    gc.set_threshold(1_000_000)  # decoding makes millions of values and no cycles: collecting would find nothing
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + limits.worker_memory_bytes,) * 2)
