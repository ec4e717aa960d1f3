"""What is peculiar to the store in a directory: who meets what another left half done makes it durable."""

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from knapper.store import directory
from knapper.store.directory import DirectoryStore
from tests.sim.disk import Disk

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what was synced is found in /proc")
CUTS = 30  # each drops half of what was not synced


class Died(BaseException):
    """kill -9."""


@contextmanager
def cut_again_and_again(scratch: Path) -> Iterator[list[Disk]]:
    """Disks, each with another fate."""
    for seed in range(CUTS):
        (scratch / f"disk-{seed}").mkdir()
    yield [Disk(scratch / f"disk-{seed}", random.Random(seed)) for seed in range(CUTS)]


def die_at(disk: Disk, number: int) -> None:
    """At the sync of this number from now on, counted from 1."""
    left = iter(range(number - 1))

    def count() -> None:
        if next(left, None) is None:
            disk.before_sync = lambda: None
            raise Died

    disk.before_sync = count


@pytest.mark.parametrize("died_at", range(1, 6))
@pytest.mark.parametrize("then", ["put", "get"])
def test_what_another_left_half_done_is_durable_once_it_was_met(tmp_path: Path, died_at: int, then: str) -> None:
    """A writer dies at any of its syncs; an object that a process has seen is there after a power cut."""
    met = 0
    with cut_again_and_again(tmp_path) as disks:
        for each in disks:
            with each as disk:
                writer, other = DirectoryStore(disk.root), DirectoryStore(disk.root)
                die_at(disk, died_at)
                try:
                    asyncio.run(writer.put_if_absent("runs/b/in/1", b"operation"))
                except Died:
                    pass
                if then == "put":
                    asyncio.run(other.put_if_absent("runs/b/in/1", b"operation"))
                    there = True
                else:
                    there = asyncio.run(other.get("runs/b/in/1")) is not None
                disk.cut()
                data = asyncio.run(DirectoryStore(disk.root).get("runs/b/in/1"))
                assert data == (b"operation" if there else data)
                met += there
    assert met == (CUTS if then == "put" or died_at > 4 else 0), "which sync it died at is not what was thought"


def test_what_was_left_half_done_is_durable_before_its_mark_is_forgotten(tmp_path: Path) -> None:
    with cut_again_and_again(tmp_path) as disks:
        for each in disks:
            with each as disk:
                store = DirectoryStore(disk.root)
                asyncio.run(store.put_if_absent("a/0", b""))
                die_at(disk, 2)
                with pytest.raises(Died):
                    asyncio.run(store.put_if_absent("a/1", b"object"))
                for torn in (disk.root / ".tmp").iterdir():
                    torn.rename(torn.with_name("of-a-process-that-is-gone"))
                DirectoryStore(disk.root)
                assert not list((disk.root / ".tmp").iterdir())
                disk.cut()
                assert asyncio.run(DirectoryStore(disk.root).get("a/1")) == b"object"


def test_a_new_data_directory_is_durable_up_to_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = set[Path]()
    monkeypatch.setattr(directory, "_sync_directory", synced.add)
    DirectoryStore(tmp_path / "new" / "store")
    assert {tmp_path, tmp_path / "new", tmp_path / "new" / "store"} <= synced


def test_a_read_of_what_is_durable_syncs_nothing(tmp_path: Path) -> None:
    """Not even where a backup is made of links, which give every object another name, more than once."""
    with Disk(tmp_path, random.Random(1)) as disk:
        store = DirectoryStore(disk.root)
        asyncio.run(store.put_if_absent("a/1", b"object"))
        asyncio.run(store.put_if_absent("a/2", b"object"))
        before = disk.syncs
        for _ in range(3):
            assert asyncio.run(store.get("a/1")) == b"object"
            assert not asyncio.run(store.put_if_absent("a/1", b"object"))
        assert disk.syncs == before
        os.link(disk.root / "a" / "2", tmp_path / "backup")
        for _ in range(3):
            assert asyncio.run(store.get("a/2")) == b"object"
        assert disk.syncs == before + 1
