"""Directories that only this account of the machine can read."""

import os
import stat
from pathlib import Path

import structlog

from knapper.errors import InvalidField
from knapper.settings import variable
from knapper.store import files

_OTHERS = 0o077
_PASSING = 0o011  # to pass through a directory without listing it

log = structlog.get_logger()


def make(directory: Path, *, passable: bool = False) -> None:
    """Make the directory, and those above it that are missing, for this account alone. Of existing ones only the
    directory itself is closed if it is open to others, with a log line.

    `passable`: others keep the right to pass through it. Raises InvalidField if it cannot be closed, OSError if it
    cannot be made.
    """
    for missing in reversed([each for each in (directory, *directory.parents) if not each.exists()]):
        missing.mkdir(mode=0o700, exist_ok=True)
    with files.directory(directory) as descriptor:
        status = os.fstat(descriptor)
        mode_before = stat.S_IMODE(status.st_mode)
        mode = mode_before & ~(_OTHERS & ~_PASSING if passable else _OTHERS)
        if os.geteuid() not in (0, status.st_uid):  # its owner can open it again at any time
            raise _open_to_others(directory, f"It belongs to the account {status.st_uid}")
        if mode == mode_before:
            return
        try:
            os.fchmod(descriptor, mode)
        except OSError as error:
            raise _open_to_others(
                directory, f"Its mode is {mode_before:o}, and cannot be changed: {error.strerror}"
            ) from error
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            raise _open_to_others(directory, f"Its mode is {mode_before:o}, and its file system keeps no other")
    log.warning(
        "was open to other accounts, and is closed now",
        directory=str(directory),
        was=f"{mode_before:o}",
        mode=f"{mode:o}",
    )


def shared(inbox: Path) -> bool:
    """Whether other accounts may write to the inbox or to a folder in it."""
    try:
        folders = [inbox.stat(), *(entry.stat(follow_symlinks=False) for entry in os.scandir(inbox))]
    except OSError:
        return False
    folders = [status for status in folders if stat.S_ISDIR(status.st_mode)]
    return any(status.st_mode & 0o022 or status.st_uid != os.geteuid() for status in folders)


def _open_to_others(directory: Path, why: str) -> InvalidField:
    return InvalidField(
        variable("data"), str(directory), "a directory that only this account can read", f"{why}; make it yours with "
        "`chown` and `chmod 700`, or choose another, which is then made so",
    )  # fmt: skip
