"""A child process: it dies with us, its own die with it, its output joins ours, its last words are remembered."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import BinaryIO

from knapper.local import process_group

_CHILD = Path(__file__).with_name("child.py")
_last_bytes_max = 4096
_last_lines_max = 4  # all of it has been relayed already; this is the reason in short


class Process:
    """Made by `start`, which must run on the main thread (see child.py)."""

    def __init__(self, process: asyncio.subprocess.Process, output: BinaryIO) -> None:
        self._process = process
        self._last = b""
        self._relay = asyncio.create_task(self._relay_output(output))
        self.pid = process.pid
        self.exited = asyncio.create_task(self._exit())  # awaited by several: shield it

    @staticmethod
    async def start(command: Sequence[str], environment: Mapping[str, str], inherit: Iterable[int] = ()) -> "Process":
        """Run the command; `inherit`: file descriptors that it keeps under their numbers."""
        # Not asyncio's pipe: with that, a process has not ended while one that it started holds the other end.
        ours, theirs = os.pipe()
        output = os.fdopen(ours, "rb", buffering=0)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-S", os.fspath(_CHILD), str(os.getpid()), *command,
                env=dict(environment), pass_fds=tuple(inherit),
                stdin=asyncio.subprocess.DEVNULL, stdout=theirs, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
        except BaseException:
            output.close()
            raise
        finally:
            os.close(theirs)
        return Process(process, output)

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def ending(self) -> str:
        """Wait for its end, and say how it was: `exit code 3`, `killed by SIGKILL`."""
        code = await asyncio.shield(self.exited)
        if code >= 0:
            return f"exit code {code}"
        return f"killed by {signal.Signals(-code).name}"

    async def last_words(self) -> str:
        """The last lines of its output, once it has ended."""
        await asyncio.wait([self._relay], timeout=1)  # a grandchild may hold the pipe open
        lines = [line for line in self._last.decode(errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-_last_lines_max:])

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, and SIGKILL if it still lives `grace_s` seconds later. Returns when it is gone."""
        if self.alive:
            self._process.terminate()
        if not (await asyncio.wait([self.exited], timeout=grace_s))[0]:
            self.kill()
        await asyncio.shield(self.exited)

    def kill(self) -> None:
        if self.alive:
            self._process.kill()

    async def _exit(self) -> int:
        code = await self._process.wait()
        process_group.end(self.pid)
        return code

    async def _relay_output(self, output: BinaryIO) -> None:
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream), output
        )
        with closing(transport):
            while chunk := await stream.read(65536):
                self._last = (self._last + chunk)[-_last_bytes_max:]
                sys.stderr.buffer.write(chunk)
                sys.stderr.buffer.flush()
