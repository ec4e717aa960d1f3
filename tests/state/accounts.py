"""Another account of this machine, and what files are for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OTHER = 65534


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def as_other(code: str, *arguments: str, first: str = "") -> "subprocess.CompletedProcess[str]":
    """Run it as another account of this machine, and `first` before it becomes that: it may not even see our Python."""
    _need_root()
    become = f"import os, sys; os.setgroups([]); os.setgid({OTHER}); os.setuid({OTHER}); "
    command = [sys.executable, "-c", f"{first}\n{become}{code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def opened(path: Path) -> None:
    """Everybody may come as far as here: what stops them is ours. The folders on the way may be root's, as /tmp is."""
    _need_root()
    for parent in path.parents:
        if parent != Path("/") and mode(parent) != 0o1777:
            parent.chmod(0o711)


def _need_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("becoming another account needs root")
