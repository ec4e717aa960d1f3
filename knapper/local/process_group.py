"""What a child has started and not ended: its process group, which child.py makes of it."""

import os
import signal
from pathlib import Path

# Of Python's multiprocessing: it removes shared memory of those that were killed, and then ends by itself.
_TRACKER = b"multiprocessing.resource_tracker"


def end(leader: int) -> None:
    """SIGKILL for everybody in the group of `leader`, a process that has ended."""
    if not Path("/proc/self/stat").exists():
        _signal_all(leader)
        return
    for pid in _members(leader):
        try:
            if _TRACKER not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended by itself


def _members(leader: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has ended, or is hidden: not ours
            continue
        if int(fields[2]) == leader:
            found.append(int(path.name))
    return found


def _signal_all(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
