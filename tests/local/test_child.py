"""Children die with whoever started them, however that one dies."""

import asyncio
import os
import signal
import subprocess
import sys

from knapper.local.process import Process
from tests.local.work import gone, until

_PARENT = """
import asyncio, os, sys
from knapper.local.process import Process

async def main():
    sleep = "import time; print('up', flush=True); time.sleep(600)"
    child = await Process.start([sys.executable, "-c", sleep], os.environ)
    print(child.pid, flush=True)
    await child.ending()

asyncio.run(main())
"""


def test_a_child_dies_with_a_parent_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        pid = int(parent.stdout.readline())
        assert parent.stderr.readline() == b"up\n"  # it has become its command, and so has its death wish
        assert not gone(pid)
        parent.kill()
        asyncio.run(until(lambda: gone(pid)))


def test_a_child_whose_parent_is_another_process_does_not_begin() -> None:
    from knapper.local import process

    done = subprocess.run([sys.executable, process._CHILD, str(os.getpid() + 1), "echo", "begun"], capture_output=True)
    assert (done.returncode, done.stdout) == (1, b"")


def test_what_a_child_has_started_dies_with_it() -> None:
    """It is killed, and what it started knows nothing of that."""
    starting = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True); "
        "time.sleep(600)"
    )

    async def story() -> None:
        child = await Process.start([sys.executable, "-c", starting], os.environ)
        await until(lambda: child._last.endswith(b"\n"))
        started = int(child._last)
        assert not gone(started)
        child.kill()
        assert await child.ending() == "killed by SIGKILL"
        await until(lambda: gone(started))

    asyncio.run(story())


def test_the_end_of_a_child_is_told_in_words() -> None:
    async def story() -> None:
        failing = await Process.start([sys.executable, "-c", "print('last words'); raise SystemExit(3)"], os.environ)
        assert await failing.ending() == "exit code 3"
        assert await failing.last_words() == "last words"
        sleeping = await Process.start([sys.executable, "-c", "import time; time.sleep(600)"], os.environ)
        os.kill(sleeping.pid, signal.SIGKILL)
        assert await sleeping.ending() == "killed by SIGKILL"

    asyncio.run(story())


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )

    async def story() -> None:
        child = await Process.start([sys.executable, "-c", stubborn], os.environ)
        await until(lambda: child._last == b"deaf\n")
        await child.stop(grace_s=0.1)
        assert await child.ending() == "killed by SIGKILL"

    asyncio.run(story())
