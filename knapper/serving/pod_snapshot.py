"""A snapshot of this process's memory: let go before it is made, and go on as another process after it.

SIGUSR1 quiesces the process, and SIGUSR2 lets it go on. Where the settings name the sandbox's file (gVisor's, as GKE
Pod snapshots have it), a process that has loaded its model asks for an image of itself before its port binds; a pod
that starts later goes on from there, in place of importing and loading. A copy that nobody told anything notices by
itself (`ProcessIdentity.moved`). docs/decisions/0033-a-copy-is-another-process.md has the reasons.
"""

import asyncio
import signal
import ssl
import threading
from collections.abc import MutableMapping
from pathlib import Path
from secrets import token_bytes  # noqa: TID251 - from the kernel: two copies of one memory draw different ones
from typing import Final

import structlog

from knapper.concurrency import quiesce

_ENVIRONMENT: Final = "spec_environ"  # beside the file: the variables of the pod that goes on
_LINE_MAX: Final = 64
_SEED_BYTES: Final = 32

log = structlog.get_logger()


def install(loop: asyncio.AbstractEventLoop) -> None:
    """Quiesce on SIGUSR1, go on at SIGUSR2. On the main thread."""
    tasks: set[asyncio.Task[None]] = set()

    def start() -> None:
        tasks.add(task := loop.create_task(_quiesce()))
        task.add_done_callback(tasks.discard)

    loop.add_signal_handler(signal.SIGUSR1, start)
    loop.add_signal_handler(signal.SIGUSR2, resume)


async def _quiesce() -> None:
    await quiesce.quiesce()
    log.info("quiesced: it holds no claim and no connection; SIGUSR2 lets it go on")


def resume() -> None:
    """Go on as another process. On the event loop's thread."""
    ssl.RAND_add(token_bytes(_SEED_BYTES), float(_SEED_BYTES))  # two copies would draw the same keys for TLS
    quiesce.resume()
    log.info("goes on, as another process")


def offer(path: Path, environ: MutableMapping[str, str]) -> None:
    """Have an image of this process made, which holds no claim and no connection yet, and wait until it goes on.

    A copy takes the variables of its own pod. Without the file, or the right to write it, none is made. Blocks.
    """
    try:
        file = path.open("r+b", buffering=0)
    except (FileNotFoundError, PermissionError) as error:
        log.warning("no snapshot of this pod is made: no policy of workload type selects it", reason=str(error))
        return
    with file:
        file.write(b"1\n")
        if went_on(file.read(_LINE_MAX), path, environ):
            resume()


def went_on(said: bytes, path: Path, environ: MutableMapping[str, str]) -> bool:
    """Whether this is a copy of what was running, by what the sandbox said; it then has another environment."""
    outcome = said.split()[0].decode(errors="replace") if said.split() else ""
    if outcome != "restore":
        log.info("the snapshot of this pod", outcome=outcome or "nothing was said")
        return False
    variables = (path.parent / _ENVIRONMENT).read_bytes().split(b"\0")
    environ.update(
        (name.decode(), value.decode()) for name, _, value in (each.partition(b"=") for each in variables) if name
    )
    log.info("restored from a snapshot of another pod")
    return True


def watch(path: Path, loop: asyncio.AbstractEventLoop, environ: MutableMapping[str, str]) -> None:
    """Go on as another process in every copy that is restored from an image that others asked for."""

    def wait() -> None:
        while True:
            try:
                with path.open("rb", buffering=0) as file:
                    said = file.read(_LINE_MAX)
            except OSError:
                return  # the sandbox has no such file
            if not said:
                return
            if went_on(said, path, environ):
                loop.call_soon_threadsafe(resume)

    threading.Thread(target=wait, name="pod snapshots", daemon=True).start()
