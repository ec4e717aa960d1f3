"""Directories that no other account of the machine may look into."""

import os
import stat
from pathlib import Path

import structlog

from knapper.errors import InvalidField
from knapper.settings import variable
from knapper.store import files

_OTHERS = 0o077
_PASSING = 0o011  # to go through a directory, and not to see what is in it

log = structlog.get_logger()


def make(directory: Path, *, passable: bool = False) -> None:
    """Make the directory for this account alone; one that is there and open to others is closed, and a line says so.

    `passable`: others may go through it, if they may now. Raises InvalidField if it cannot be closed, OSError if it
    cannot be made.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.directory(directory) as opened:
        status = os.fstat(opened)
        was = stat.S_IMODE(status.st_mode)
        mode = was & ~(_OTHERS & ~_PASSING if passable else _OTHERS)
        if os.geteuid() not in (0, status.st_uid):  # its owner can open it again at any time
            raise _open_to_others(directory, f"It belongs to the account {status.st_uid}")
        if mode == was:
            return
        try:
            os.fchmod(opened, mode)
        except OSError as error:
            raise _open_to_others(directory, f"Its mode is {was:o}, and cannot be changed: {error.strerror}") from error
        if stat.S_IMODE(os.fstat(opened).st_mode) != mode:
            raise _open_to_others(directory, f"Its mode is {was:o}, and its file system keeps no other")
    log.warning(
        "was open to other accounts, and is closed now", directory=str(directory), was=f"{was:o}", mode=f"{mode:o}"
    )


def shared(inbox: Path) -> bool:
    """Whether other accounts are meant to write to it, or to a folder in it."""
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
