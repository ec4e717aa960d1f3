"""Weights are read into the page cache ahead of the loader, whole, and only where they fit."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from knapper.engine import host_memory
from knapper.engine.models import prefetch


def resident(path: Path) -> float:
    """The part of its pages that are in memory, as the kernel says without reading any."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), pages) == 0
        return sum(page & 1 for page in pages) / len(pages)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file that is on the disk, and not in the page cache."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(3 * prefetch._RANGE_BYTES - 5))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path) > 0.1:
        pytest.skip("this file system keeps everything in memory")
    return path


def test_a_models_files_are_in_memory_after_it(cold: Path) -> None:
    thread = prefetch.begin(cold.parent)
    assert thread is not None
    thread.join(30)
    assert resident(cold) == 1.0


def test_what_does_not_fit_is_left_to_the_loader(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 2 * prefetch._RANGE_BYTES)
    assert prefetch.begin(cold.parent) is None
    assert resident(cold) < 0.1


def test_a_file_that_cannot_be_read_is_no_error_here(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert prefetch.begin(tmp_path) is None
