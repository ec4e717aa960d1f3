"""Room for an export, asked for before anything is written."""

import shutil
from pathlib import Path
from typing import Final

from knapper.engine import host_memory
from knapper.errors import UserError
from knapper.text.sizes import sized

_SPARE_BYTES: Final = 64 * 1024 * 1024  # configuration, tokenizer, and what the filesystem takes for itself


def expect_disk(where: Path, wanted: int, what: str) -> None:
    """Raises UserError unless the disk of `where`, which may not exist yet, has so many bytes left."""
    there = where
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if free < wanted + _SPARE_BYTES:
        raise UserError(
            f"{what} takes {sized(wanted + _SPARE_BYTES)}, and the disk of {there} has {sized(free)} left; free some, "
            "or name a directory on another disk by --out"
        )


def expect_memory(wanted: int, what: str) -> None:
    """Raises UserError unless this process can take so many bytes more."""
    if (free := host_memory.available()) < wanted:
        raise UserError(
            f"{what} takes {sized(wanted)} of memory, and {sized(free)} are left; end other programs, or raise the "
            "container's limit"
        )
