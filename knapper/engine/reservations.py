"""What the engines of one machine plan to take of its memory, so that each plans with what the others leave.

An engine a base model: each loads in its turn, and leaves a file in the run directory that says how much its account
comes to. What of that it has not taken yet is not free for the others, though the kernel says so.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PREFIX: Final = "memory-"
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class Reservations:
    """`run_directory`: the engines of one `knapper up` share it. `proc`: where the kernel tells of processes."""

    def __init__(self, run_directory: Path, proc: Path = Path("/proc")) -> None:
        run_directory.mkdir(parents=True, exist_ok=True)
        self._directory = run_directory
        self._proc = proc

    @contextmanager
    def turn(self) -> Iterator[int]:
        """This process alone loads, until the end. The bytes that other engines have planned for and not taken."""
        with (self._directory / "loading.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield sum(self._planned())

    def write(self, total: int) -> None:
        """This process plans to take so many bytes in all."""
        pid = os.getpid()
        (self._directory / f"{_PREFIX}{pid}").write_text(f"{self._started(pid)} {total}")

    def _planned(self) -> Iterator[int]:
        for path in self._directory.glob(f"{_PREFIX}*"):
            pid = int(path.name.removeprefix(_PREFIX))
            started, _, total = path.read_text().partition(" ")
            if not total or started != self._started(pid):
                path.unlink(missing_ok=True)  # it ended; another process may have its number
            elif pid != os.getpid():
                yield max(0, int(total) - self._resident(pid))

    def _started(self, pid: int) -> str:
        """When the process started, in the kernel's ticks; empty if there is none."""
        try:
            return (self._proc / str(pid) / "stat").read_text().rpartition(") ")[2].split()[19]
        except OSError:
            return ""

    def _resident(self, pid: int) -> int:
        try:
            return int((self._proc / str(pid) / "statm").read_text().split()[1]) * _PAGE
        except OSError:
            return 0
