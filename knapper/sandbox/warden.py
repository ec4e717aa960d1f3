"""The process that forks cells: it runs nobody's code but ours, loads what cells need once, and ends each in time.

`python -S -P warden.py CONFIG`, with a socket as standard input. For a run the caller sends the letter `1` or `2` and
as many frames (4 bytes of length, then JSON). The warden does not read the frames: the cell does, so that a cell holds
its own run in its memory and nothing of any other. A run of two cells links them by a pair of sockets: the first cell
has a program, the second tests it and gives the result; neither sees the other's frame.

The answer is a frame too: a letter, how the run ended, and what the cell wrote into its pipe, which proves nothing.
"""

import json
import os
import select
import signal
import socket
import struct
import sys
import time
from typing import NoReturn

CONTROL = 0  # the socket to the caller
FAILED = 0  # the first byte of what a cell writes whose task raised; then the error. No JSON begins so
taken_s_max = 60.0  # a cell has read its frame after this, or the caller is stuck


def main(config: dict[str, object]) -> NoReturn:
    """Set up, say hello, serve runs until the caller is gone."""
    from knapper.sandbox import cell, layers, seccomp  # the path is set by whoever starts this file

    layers.die_with_parent(int(str(config["parent"])))
    lacking = {"namespaces": layers.own_namespaces(), "landlock": layers.read_only_below(readable(config))}
    missing = seccomp.unsupported()
    if not missing:
        try:
            seccomp.install("warden")
        except OSError as error:
            missing = str(error)
    cell.load([*cell.COMMON, *map(str, list(config["imports"]))])  # type: ignore[call-overload]  # a list of names
    if not missing:
        missing = proof()
    hello = {"missing": missing, "lacking": {name: reason for name, reason in lacking.items() if reason}}
    send(json.dumps(hello).encode())
    while letter := received(1):
        serve(pair=letter == b"2", seal=not missing)
    os._exit(0)


def readable(config: dict[str, object]) -> list[str]:
    """Where modules and shared libraries lie. /proc: a cell asks there how large it is, before it is sealed."""
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/proc", "/dev/null"]
    return [*map(str, list(config["path"])), *map(str, list(config["prefixes"])), *system]  # type: ignore[call-overload]  # lists, too


def proof() -> str:
    """A cell tries what must be impossible. Nothing, or what was possible, and therefore why code is refused here."""
    from knapper.sandbox import cell

    pipe, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os._exit(cell.prove(end))
    os.close(end)
    said = collect(pid, pipe, time.monotonic() + 20)[1]
    return "" if said == b"sealed" else f"a sealed process could: {said.decode(errors='replace') or 'not be made'}"


def serve(*, pair: bool, seal: bool) -> None:
    """One run: fork its cells, wait for the last one's result, end them all, answer."""
    links = socket.socketpair() if pair else (None, None)
    cells: list[tuple[int, int, float]] = []
    for link in links if pair else (None,):
        pipe, end = os.pipe()
        started, warden = time.monotonic(), os.getpid()
        pid = os.fork()
        if pid == 0:
            start(end, link.detach() if link else -1, warden, seal=seal)
        os.close(end)
        if link:
            link.close()
        cells.append((pid, pipe, started + taken(pipe)))
    pid, pipe, deadline = cells[-1]
    how, output = collect(pid, pipe, deadline)
    for other, unread, _ in cells[:-1]:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(unread)
    send(how + output)


def start(end: int, link: int, warden: int, *, seal: bool) -> NoReturn:
    """In the child: read the frame, say how long it may take, and become the cell."""
    from knapper.sandbox import cell

    try:
        (size,) = struct.unpack("!I", exactly(4))
        order = json.loads(exactly(size))
        os.write(end, struct.pack("!d", order["timeout_s"]))
        cell.run(order, end, link, warden, seal=seal)
    except BaseException as error:  # noqa: BLE001  a process border; the caller says it on
        said = f"{type(error).__name__}: {error}"[:1000].encode(errors="backslashreplace")
        os.write(end, bytes([FAILED]) + said)
    finally:
        os._exit(0)


def taken(pipe: int) -> float:
    """The seconds that the cell's order grants, said once the frame is off the socket. The warden ends without it."""
    if not select.select([pipe], [], [], taken_s_max)[0] or len(said := os.read(pipe, 8)) != 8:
        os._exit(1)
    return float(struct.unpack("!d", said)[0])


def collect(pid: int, pipe: int, deadline: float) -> tuple[bytes, bytes]:
    """How the cell ended, and its output: `t`ime over, `o`utput over the limit, `e`xit, or killed by `s`ignal."""
    from knapper import limits

    output, how = b"", b""
    while not how:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([pipe], [], [], left_s)[0]:
            how = b"t"
        elif not (chunk := os.read(pipe, 65536)):
            break
        else:
            output += chunk
            how = b"o" if len(output) > limits.sandbox_output_bytes_max else b""
    os.close(pipe)
    code = None if how else ended(pid, deadline)
    if code is None:  # its time is over, or it closed its pipe and goes on
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return how or b"t", b""
    return (b"s", str(code).encode()) if code else (b"e", output)


def ended(pid: int, deadline: float) -> int | None:
    """The exit code of a cell whose pipe is closed: that is its last act, unless it is up to something. Then None."""
    while time.monotonic() <= deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    return None


def exactly(size: int) -> bytes:
    whole = bytearray()
    while len(whole) < size:
        if not (chunk := received(size - len(whole))):
            os._exit(0)
        whole += chunk
    return bytes(whole)


def received(size: int) -> bytes:
    """At most so many bytes from the caller; none once it is gone, which is no error, whenever it goes."""
    try:
        return os.read(CONTROL, size)
    except ConnectionResetError:
        return b""


def send(content: bytes) -> None:
    """To the caller. Ends the process if there is none any more."""
    frame = struct.pack("!I", len(content)) + content
    try:
        while frame:
            frame = frame[os.write(CONTROL, frame) :]
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    sys.path[:] = given["path"]
    main(given)
