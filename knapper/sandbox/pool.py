"""Running tasks in cells, from outside: wardens that were started before are used again; each cell is new."""

import asyncio
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from knapper.errors import Unavailable, UserError
from knapper.sandbox.warden import FAILED
from knapper.store.cache import LruCache
from knapper.wire.untrusted import parsing

log = structlog.get_logger()

_WARDEN = Path(__file__).with_name("warden.py")
# Nothing of ours: no keys, no paths. One thread each, since cells cannot start any; a fixed hash order and time zone.
_ENVIRONMENT = {
    "LC_ALL": "C.UTF-8", "TZ": "UTC0", "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip
_start_s_max = 60.0  # importing what the code names, on a slow disk
_grace_s = 15.0  # the warden ends a cell in time; this is for a warden that does not
_idle_max = 8  # wardens that wait for more work


class SandboxMissing(UserError):
    """This machine cannot hold code that is not ours, so it runs none."""

    code = "sandbox_missing"


@dataclass(frozen=True)
class Order:
    """One cell's work. `task`: module:function of ours; `codes`: which arguments are Python code of somebody else.

    `reads`: it may go on reading files, as libraries do that load their parts late. Never with somebody else's code.
    `trial`: it loads with as much memory as a warden, to find out what a warden can load.
    """

    task: str
    arguments: dict[str, Any]
    timeout_s: float
    seed: str = ""
    codes: Sequence[str] = ()
    reads: bool = False
    trial: bool = False

    def frame(self) -> bytes:
        """Raises UserError for arguments that are nested too deeply."""
        order = {
            "task": self.task, "arguments": self.arguments, "timeout_s": self.timeout_s, "seed": self.seed,
            "codes": list(self.codes), "reads": self.reads, "trial": self.trial,
        }  # fmt: skip
        with parsing(lambda error: UserError(f"prompt and answer cannot be sent to the sandbox: {error}")):
            content = json.dumps(order).encode()
        return struct.pack("!I", len(content)) + content


class Ended(UserError):
    """The cell ended without a result: the text says how."""


@dataclass(eq=False)
class _Warden:
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    missing: str

    def kill(self) -> None:
        self.writer.close()
        with suppress(ProcessLookupError):
            self.process.kill()


@dataclass
class Sandbox:
    """Cells for one process; at most `at_once` run at a time. Close it at the end."""

    at_once: int = field(default_factory=lambda: min(os.cpu_count() or 1, 8))
    lacking: dict[str, str] = field(default_factory=dict)  # further walls that this machine does not give, and why

    def __post_init__(self) -> None:
        self._turns = asyncio.Semaphore(self.at_once)
        self._idle: list[tuple[frozenset[str], _Warden]] = []  # the one used longest ago first
        self._all: set[_Warden] = set()
        self.loaded: LruCache[str, tuple[str, ...]] = LruCache()  # by code: what of its imports a cell could load

    async def run(self, *orders: Order, imports: Sequence[str] = (), sealed: bool = True) -> Any:
        """What the last order's task returns. Two orders: two cells, linked; the first cannot see the second's order.

        `imports`: modules that are loaded before the fork, for all runs that name the same. `sealed`: refuse where the
        machine cannot seal; without it the task must be code of ours. Raises Ended, SandboxMissing, Unavailable.
        """
        async with self._turns:
            key = frozenset(imports)
            warden = await self._take(key)
            try:
                if sealed and warden.missing:
                    raise SandboxMissing(
                        f"this machine cannot run code in a sandbox: {warden.missing}; allowed: Linux on x86_64 or "
                        "aarch64 with seccomp. Run the reward function there, or use a reward that runs no code"
                    )
                answer = await self._ask(warden, orders)
            except SandboxMissing:
                self._give_back(key, warden)
                raise
            except BaseException:  # whoever waited is gone, or the warden is: what it does now is of no use
                await self._end(warden)
                raise
            self._give_back(key, warden)
        return _result(answer, orders[-1].timeout_s)

    @property
    def pids(self) -> list[int]:
        """Of the wardens that live."""
        return [warden.process.pid for warden in self._all]

    async def close(self) -> None:
        """End every warden, and with it every cell."""
        await asyncio.gather(*(self._end(warden) for warden in list(self._all)))
        self._idle.clear()

    async def _ask(self, warden: _Warden, orders: Sequence[Order]) -> bytes:
        limit_s = sum(order.timeout_s for order in orders) + _grace_s
        try:
            async with asyncio.timeout(limit_s):
                warden.writer.write(str(len(orders)).encode() + b"".join(order.frame() for order in orders))
                await warden.writer.drain()
                return await _frame(warden.reader)
        except (OSError, EOFError, TimeoutError) as error:
            raise Unavailable(f"the sandbox's own process ended, or did not answer: {error!r}") from error

    async def _take(self, key: frozenset[str]) -> _Warden:
        for n in range(len(self._idle) - 1, -1, -1):
            if self._idle[n][0] == key:
                warden = self._idle.pop(n)[1]
                if warden.process.returncode is None:
                    return warden
                await self._end(warden)
        return await self._start(key)

    def _give_back(self, key: frozenset[str], warden: _Warden) -> None:
        self._idle.append((key, warden))
        if len(self._idle) > _idle_max:
            _, oldest = self._idle.pop(0)
            self._all.discard(oldest)
            oldest.kill()

    async def _start(self, imports: frozenset[str]) -> _Warden:
        ours, theirs = socket.socketpair()
        config = {
            "path": [entry for entry in sys.path if entry.startswith("/")],
            "prefixes": sorted({sys.prefix, sys.base_prefix, sys.exec_prefix}),
            "imports": sorted(imports),
            "parent": os.getpid(),
        }
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-s", "-S", "-P", os.fspath(_WARDEN), json.dumps(config),
                    env=_ENVIRONMENT, cwd="/", stdin=theirs.fileno(), stdout=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
            except BaseException:  # whoever waited is gone, or no process can be started
                writer.close()
                raise
        warden = _Warden(process, reader, writer, "")
        self._all.add(warden)
        try:
            async with asyncio.timeout(_start_s_max):
                hello = json.loads(await _frame(reader))
        except (OSError, EOFError, TimeoutError) as error:
            await self._end(warden)
            raise Unavailable(f"the sandbox did not start: {error!r}") from error
        except BaseException:
            await self._end(warden)
            raise
        warden.missing, self.lacking = hello["missing"], hello["lacking"]
        log.debug("sandbox started", pid=process.pid, missing=warden.missing, lacking=self.lacking)
        return warden

    async def _end(self, warden: _Warden) -> None:
        self._all.discard(warden)
        warden.kill()
        await warden.process.wait()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    (size,) = struct.unpack("!I", await reader.readexactly(4))
    return await reader.readexactly(size)


def _result(answer: bytes, timeout_s: float) -> Any:
    how, output = answer[:1], answer[1:]
    if how == b"t":
        raise Ended(f"it ran over its {timeout_s:g} s")
    if how == b"o":
        raise Ended("it wrote more into its result channel than a result")
    if how == b"s":
        code = int(output)
        raise Ended(f"it was killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}")
    if not output:
        raise Ended("it ended without a result")
    if output[0] == FAILED:
        raise Ended(f"it failed: {output[1:].decode(errors='replace')}")
    with parsing(lambda _: Ended("it wrote something else than a result into its result channel")):
        return json.loads(output)
