"""A uvicorn process on a socket that the supervisor bound: no port is guessed, and none can be taken in between."""

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
BACKLOG = 2048  # callers that wait in the kernel


async def start(application: str, directory: Path, environment: Mapping[str, str], listener: socket.socket) -> Process:
    """Serve `module:attribute` of `directory` on `listener`: it accepts after the application's start-up."""
    command = [
        sys.executable, "-P", "-m", "uvicorn", "--app-dir", str(directory), "--fd", str(listener.fileno()),
        "--workers", "1", "--loop", "uvloop", "--http", PROTOCOL, "--ws", "none", "--lifespan", "on",
        "--timeout-keep-alive", str(KEEP_ALIVE_S), "--log-level", "warning", "--no-access-log", application,
    ]  # fmt: skip
    return await Process.start(command, environment, inherit=[listener.fileno()])


def url(listener: socket.socket) -> str:
    """Where a client on this machine reaches it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


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
