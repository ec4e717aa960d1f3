"""Workers that die at the worst moment, in the middle of a message: nobody waits for the rest of it."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gateway import worker_pool
from gateway.worker_pool import WorkerPool
from knapper.errors import TooLarge

_RESULT_BYTES = 192 * 1024 * 1024  # some tenths of a second in a pipe
_SENDS = {"_send", "_between"}  # where a worker writes its result: into a pipe, into a file

_PROGRAM = """
import asyncio, os, signal, time
from gateway.worker_pool import WorkerPool

def waiting(body):
    time.sleep(60)

async def story():
    pool = WorkerPool()
    calls = [asyncio.create_task(pool.run(str(n), waiting, bytes(900_000))) for n in range(6)]
    while pool._pool is None or len(pool._pool._processes) < 2:
        await asyncio.sleep(0.1)
    await asyncio.sleep(2)
    workers = pool._pool._processes
    assert all(worker.is_alive() for worker in workers.values())
    for pid in list(workers):
        os.kill(pid, signal.SIGKILL)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    pool.close()

if __name__ == "__main__":
    asyncio.run(story())
"""


def dying(body: bytes) -> bytes:
    """A result in the middle of which its worker is killed."""
    worker = threading.get_ident()

    def kill() -> None:
        while sys._current_frames()[worker].f_code.co_name not in _SENDS:
            time.sleep(0.001)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    result = body * (_RESULT_BYTES // len(body))
    threading.Thread(target=kill, daemon=True).start()
    return result


def size(body: bytes) -> int:
    return len(body)


def test_a_worker_that_dies_as_it_answers_fails_alone_and_the_next_body_is_decoded() -> None:
    async def story() -> None:
        pool = WorkerPool()
        try:
            with pytest.raises(TooLarge, match="more memory than"):
                async with asyncio.timeout(60):
                    await pool.run("tenant", dying, bytes(65536))
            async with asyncio.timeout(60):
                assert await pool.run("tenant", size, bytes(300_000)) == 300_000
        finally:
            pool.close()

    asyncio.run(story())


def test_a_process_ends_though_its_workers_died_as_bodies_came(tmp_path: Path) -> None:
    """CPython up to 3.11.4 waits at exit for a pipe that nobody reads, if a message was too large for it."""
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM, encoding="utf-8")
    subprocess.run([sys.executable, program], timeout=60, check=True)


def test_a_call_whose_caller_is_gone_reads_and_writes_no_file_of_another_call() -> None:
    """The descriptors of an ended call are the next one's."""
    given, returned = worker_pool._Memory(), worker_pool._Memory()
    ended = given.shared, returned.shared
    del given, returned
    later = [worker_pool._Memory(), worker_pool._Memory()]
    later.sort(key=lambda each: each.shared.path != ended[0].path)
    given, returned = later
    assert [file.shared.path for file in later] == [file.path for file in ended]
    given.write(b"another tenant's")
    for files in (ended, (given.shared, ended[1]), (ended[0], returned.shared)):
        with pytest.raises(FileNotFoundError, match="another file by now"):
            worker_pool._between(*files, size)
    worker_pool._between(given.shared, returned.shared, size)
    assert returned.unpickle() == len(b"another tenant's")


def test_a_thread_that_still_writes_keeps_its_descriptor() -> None:
    """A caller that is cancelled goes while its body is being written."""
    given = worker_pool._Memory()
    path, write = given.shared.path, given.write
    del given
    assert worker_pool._Memory().shared.path != path
    write(b"late")
    del write
    assert worker_pool._Memory().shared.path == path
