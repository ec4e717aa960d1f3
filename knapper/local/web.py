"""A uvicorn process on a socket that the supervisor bound: no port is guessed, and none can be taken in between."""

import asyncio
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from knapper.errors import InvalidField
from knapper.local.process import Process

KEEP_ALIVE_S = (
    75  # longer than any client's, so that it is not the server who closes a connection that is about to be used
)
PROTOCOL = "knapper.web.connections:Protocol"

_poll_s = 0.02


async def start(application: str, directory: Path, environment: Mapping[str, str], listener: socket.socket) -> Process:
    """Serve `module:attribute` of `directory` on `listener`, which listens only after the application's start-up."""
    command = [
        sys.executable, "-P", "-m", "uvicorn", "--app-dir", str(directory), "--fd", str(listener.fileno()),
        "--workers", "1", "--loop", "uvloop", "--http", PROTOCOL, "--ws", "none", "--lifespan", "on",
        "--timeout-keep-alive", str(KEEP_ALIVE_S), "--log-level", "warning", "--no-access-log", application,
    ]  # fmt: skip
    return await Process.start(command, environment, inherit=[listener.fileno()])


async def answers(process: Process, port: int, within_s: float) -> bool:
    """Wait until the process listens on its loopback port; False if it ends first. Raises TimeoutError."""
    async with asyncio.timeout(within_s):
        while process.alive:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except ConnectionError:
                await asyncio.sleep(_poll_s)
            else:
                writer.close()
                return True
        return False


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises InvalidField if host or port cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise InvalidField("host", host, "an address of this machine", str(error)) from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Accepted sockets inherit it. asyncio sets it on what it knows to be TCP, and uvicorn's --fd takes all for AF_UNIX.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InvalidField("port", port, f"a free port of {host}, or 0 for any", f"{error.strerror}") from error
    return listener
