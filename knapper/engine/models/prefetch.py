"""Reads a model's weight files into the page cache, in large ranges side by side, while torch is still being imported.

The loader maps the files, and reads a page when it meets it: from a disk, or a bucket that is mounted, that is one
small read after another. Loads no torch.
"""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from knapper.engine import host_memory
from knapper.engine.models import weight_files

_RANGE_BYTES: Final = 8 << 20
_AT_ONCE: Final = 8
_MEMORY_PART: Final = 0.5  # of the memory that is free: more could push out what was read first


def begin(directory: Path) -> threading.Thread | None:
    """Start reading; None if there is nothing, or too much. What cannot be read is the loader's to report."""
    files = [path for path in sorted(directory.glob("*.safetensors")) if path.is_file()]
    spans = [(path, *span) for path in files for span in weight_files.read_spans(path)]
    if not 0 < sum(end - start for _, start, end in spans) <= _MEMORY_PART * host_memory.available():
        return None
    ranges = [
        (path, at, min(_RANGE_BYTES, end - at)) for path, start, end in spans for at in range(start, end, _RANGE_BYTES)
    ]
    thread = threading.Thread(target=_read, args=(ranges,), name="prefetch", daemon=True)
    thread.start()
    return thread


def _read(ranges: list[tuple[Path, int, int]]) -> None:
    with ThreadPoolExecutor(_AT_ONCE, "prefetch") as threads:
        list(threads.map(_read_range, ranges))


def _read_range(place: tuple[Path, int, int]) -> None:
    path, at, size = place
    with suppress(OSError), path.open("rb", buffering=0) as file:
        if not _is_in_memory(file.fileno(), at):
            file.seek(at)
            file.read(size)


def _is_in_memory(descriptor: int, at: int) -> bool:
    """Whether the range's first page is; a copy of the whole would take a core from the import."""
    nowait = getattr(os, "RWF_NOWAIT", None)  # Linux: read what the page cache has, or nothing
    if nowait is None:
        return False
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], at, nowait))
    except OSError:
        return False
