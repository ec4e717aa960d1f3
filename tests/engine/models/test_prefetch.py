"""Weights are read into the page cache ahead of the loader, whole, and only where they fit."""

import os
from pathlib import Path

import pytest

from knapper.engine import host_memory
from knapper.engine.models import prefetch

RANGES = 3


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file that is on the disk, and not in the page cache."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(RANGES * prefetch._RANGE_BYTES - 5))
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(in_memory(path)):
            pytest.skip("this file system keeps everything in memory, or does not tell")
    return tmp_path


def in_memory(path: Path) -> list[bool]:
    with path.open("rb") as file:
        return [prefetch._is_in_memory(file.fileno(), n * prefetch._RANGE_BYTES) for n in range(RANGES)]


def test_a_models_files_are_in_memory_after_it(cold: Path) -> None:
    thread = prefetch.begin(cold)
    assert thread is not None
    thread.join(30)
    assert in_memory(cold / "model.safetensors") == [True] * RANGES


def test_what_does_not_fit_is_left_to_the_loader(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "available", lambda: 2 * prefetch._RANGE_BYTES)
    assert prefetch.begin(cold) is None
    assert not any(in_memory(cold / "model.safetensors"))


def test_a_file_that_cannot_be_read_is_no_error_here(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert prefetch.begin(tmp_path) is None
