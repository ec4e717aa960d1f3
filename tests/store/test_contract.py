"""One suite that every store passes."""

import asyncio
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from knapper.errors import StoreError
from knapper.store import Store, files
from knapper.store.directory import DirectoryStore
from knapper.store.memory import MemoryStore

Open = Callable[[], Store]


@pytest.fixture(params=["memory", "directory", "gcs", "gcs in a directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    opened: dict[str, Callable[[], Store]] = {
        "memory": MemoryStore,
        "directory": lambda: DirectoryStore(tmp_path / "store"),
        "gcs": lambda: request.getfixturevalue("new_bucket")(),
        "gcs in a directory": lambda: request.getfixturevalue("bucket_in_a_directory"),
    }
    return opened[request.param]()


def test_the_first_writer_wins_and_the_object_never_changes(store: Store) -> None:
    async def story() -> None:
        assert await store.put_if_absent("a/b", b"first")
        assert not await store.put_if_absent("a/b", b"second")
        assert await store.get("a/b") == b"first"

    asyncio.run(story())


def test_of_many_concurrent_writers_exactly_one_wins(store: Store) -> None:
    async def story() -> None:
        for name in ("x/1", "x/2", "y/1"):
            won = await asyncio.gather(*(store.put_if_absent(name, bytes([n])) for n in range(24)))
            assert sum(won) == 1
            assert await store.get(name) == bytes([won.index(True)])

    asyncio.run(story())


def test_missing_objects_read_as_none_and_are_deleted_without_error(store: Store) -> None:
    async def story() -> None:
        assert await store.get("nowhere/at/all") is None
        await store.delete("nowhere/at/all")
        assert await store.put_if_absent("a", b"")
        assert await store.get("a") == b""
        await store.delete("a")
        assert await store.get("a") is None
        assert await store.put_if_absent("a", b"again")

    asyncio.run(story())


def test_listing_follows_code_points_of_whole_names(store: Store) -> None:
    names = ["a-b/1", "a/1", "a/10", "a/2", "a/b/c", "ab", "run:1/x", "run:1/y", "run:10/x"]

    async def story() -> None:
        for name in random.Random(0).sample(names, len(names)):
            await store.put_if_absent(name, b"x")
        assert await store.list("") == sorted(names)
        assert await store.list("a/") == ["a/1", "a/10", "a/2", "a/b/c"]
        assert await store.list("a") == sorted(name for name in names if name.startswith("a"))
        assert await store.list("a/1") == ["a/1", "a/10"]
        assert await store.list("a/", start_after="a/10") == ["a/2", "a/b/c"]
        assert await store.list("a/", start_after="a/1", limit=2) == ["a/10", "a/2"]
        assert await store.list("run:1/") == ["run:1/x", "run:1/y"]
        assert await store.list("zzz") == []

    asyncio.run(story())


def test_listings_agree_with_a_plain_model_on_random_histories(store: Store) -> None:
    draw = random.Random(7)
    model: dict[str, bytes] = {}
    pool = [f"{a}/{b}{n}" for a in ("p", "p-q", "q") for b in ("", "0", "a") for n in range(4)]

    async def story() -> None:
        for _ in range(300):
            name = draw.choice(pool)
            if draw.random() < 0.6:
                assert await store.put_if_absent(name, name.encode()) == (name not in model)
                model.setdefault(name, name.encode())
            else:
                await store.delete(name)
                model.pop(name, None)
            prefix = draw.choice(pool)[: draw.randrange(4)]
            after = draw.choice(["", *pool])
            expected = sorted(n for n in model if n.startswith(prefix) and n > after)
            assert await store.list(prefix, start_after=after) == expected
            assert await store.list(prefix, start_after=after, limit=2) == expected[:2]

    asyncio.run(story())


@pytest.mark.parametrize("name", ["", "/", "a/", "/a", "a//b", "../a", "a/../b", "a/.", "a\0b", "x" * 901])
def test_names_that_could_escape_are_refused(store: Store, name: str) -> None:
    for verb in (store.get, store.delete):
        with pytest.raises(ValueError, match="bad object name"):
            asyncio.run(verb(name))
    with pytest.raises(ValueError, match="bad object name"):
        asyncio.run(store.put_if_absent(name, b""))


def test_large_objects_come_back_whole(store: Store) -> None:
    data = random.Random(1).randbytes(9_000_000)
    assert asyncio.run(store.put_if_absent("big", data))
    assert asyncio.run(store.get("big")) == data


def test_a_directory_keeps_its_objects_and_drops_torn_writes(tmp_path: Path) -> None:
    first = DirectoryStore(tmp_path)
    asyncio.run(first.put_if_absent("a/b", b"kept"))
    (tmp_path / ".tmp" / "999999999-0").write_bytes(b"torn")  # of a process that is gone
    second = DirectoryStore(tmp_path)
    assert asyncio.run(second.get("a/b")) == b"kept"
    assert asyncio.run(second.list("")) == ["a/b"]
    assert not list((tmp_path / ".tmp").iterdir())


def test_a_directory_of_objects_that_are_all_deleted_goes_with_the_last(tmp_path: Path) -> None:
    """Else a run of many steps would leave one for each adapter that it ever had, and every listing walk them all."""
    store = DirectoryStore(tmp_path)

    async def story() -> None:
        for name in ("a/b/c/1", "a/b/c/2", "a/b/d/1"):
            await store.put_if_absent(name, b"x")
        await store.delete("a/b/c/1")
        assert await store.list("a/") == ["a/b/c/2", "a/b/d/1"]
        await store.delete("a/b/c/2")

    asyncio.run(story())
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["d"]
    for _ in range(2):
        asyncio.run(store.delete("a/b/d/1"))
    assert [path.name for path in tmp_path.iterdir()] == [".tmp"]


class Tidied(DirectoryStore):
    """Somebody deletes the last object of the directory at the worst moment: it was made, and has no file yet."""

    def __init__(self, root: Path, times: int) -> None:
        super().__init__(root)
        self.times = times

    def _make_directory(self, directory: Path) -> None:
        super()._make_directory(directory)
        if self.times and directory.name == "er":
            self.times -= 1
            self._delete(directory / "last")


def test_a_write_beside_the_deletion_of_its_neighbours_is_not_lost(tmp_path: Path) -> None:
    store = Tidied(tmp_path, times=3)
    assert asyncio.run(store.put_if_absent("deep/er/1", b"kept"))
    assert store.times == 0
    assert asyncio.run(store.get("deep/er/1")) == b"kept"


class Overtaken(DirectoryStore):
    """Whoever deletes the directory's last object does so when ours is gone, and the directory not yet on the disk."""

    def _remove_empty(self, directory: Path) -> Path:
        left = super()._remove_empty(directory)
        if left.name == "er":
            shutil.rmtree(left)
        return left


def test_a_deletion_beside_that_of_its_last_neighbour_succeeds(tmp_path: Path) -> None:
    store = Overtaken(tmp_path)

    async def story() -> None:
        for name in ("deep/er/1", "deep/er/2", "deep/3"):
            await store.put_if_absent(name, b"x")
        await store.delete("deep/er/1")
        assert await store.list("deep/") == ["deep/3"]

    asyncio.run(story())


def test_two_stores_of_one_process_never_write_the_same_temporary_file(tmp_path: Path) -> None:
    stores = DirectoryStore(tmp_path), DirectoryStore(tmp_path)

    async def story() -> None:
        for n in range(20):
            await asyncio.gather(*(stores[k % 2].put_if_absent(f"{n}/{k}", b"%d" % k) for k in range(8)))
            for k in range(8):
                assert await stores[0].get(f"{n}/{k}") == b"%d" % k

    asyncio.run(story())


def test_a_file_system_that_may_only_be_read_is_said_so_and_still_read(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a disk needs root")
    try:
        store = DirectoryStore(disk)
        assert asyncio.run(store.put_if_absent("a/b", b"kept"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for verb in (store.put_if_absent("a/c", b""), store.delete("a/b")):
            with pytest.raises(StoreError, match="the file system is read-only"):
                asyncio.run(verb)
        assert asyncio.run(store.get("a/b")) == b"kept"
        assert asyncio.run(store.list("")) == ["a/b"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_said_so_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a disk needs root")
    try:
        store = DirectoryStore(disk)
        with pytest.raises(StoreError, match="disk is full"):
            asyncio.run(store.put_if_absent("a/b", b"x" * 100_000))
        assert asyncio.run(store.get("a/b")) is None
        assert asyncio.run(store.put_if_absent("a/b", b"now"))
        assert list((disk / ".tmp").iterdir()) == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


_WRITER = """
import asyncio, os, sys
from pathlib import Path
from knapper.store.directory import DirectoryStore

root, who = Path(sys.argv[1]), sys.argv[2]

async def main():
    store = DirectoryStore(root)
    Path(root, f"ready-{who}").touch()
    while not all(Path(root, f"ready-{each}").exists() for each in "ab"):
        pass
    for n in range(300):
        data = who.encode() * 50_000 + b"%d" % n
        assert await store.put_if_absent(f"x/{who}/{n}", data)
        assert Path(root, "x", who, str(n)).read_bytes() == data, "acknowledged, and with the bytes of somebody else"

print(os.getpid(), flush=True)
asyncio.run(main())
"""


def test_two_containers_with_one_pid_write_their_own_objects(tmp_path: Path) -> None:
    """Each is the first process of its own pid namespace; a third one opens the store again and again meanwhile."""
    spaces = ["unshare", "--pid", "--fork"]
    if subprocess.run([*spaces, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a namespace of pids needs root")
    command = [*spaces, sys.executable, "-c", _WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, who], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for who in "ab"]
    while any(writer.poll() is None for writer in writers):
        DirectoryStore(tmp_path)  # forgets torn writes, and theirs are none
    said = [writer.communicate() for writer in writers]
    assert [(out, writer.returncode) for (out, _), writer in zip(said, writers, strict=True)] == [(b"1\n", 0)] * 2, said
    assert list((tmp_path / ".tmp").iterdir()) == []


def test_what_a_killed_writer_left_is_forgotten_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    DirectoryStore(tmp_path)
    (tmp_path / ".tmp" / "4194304-7").write_bytes(b"torn, by an earlier version")
    (tmp_path / ".tmp" / files.random_name()).write_bytes(b"torn")
    under_way = tmp_path / ".tmp" / files.random_name()
    with files.create_locked(under_way):
        DirectoryStore(tmp_path)
        assert list((tmp_path / ".tmp").iterdir()) == [under_way]
    DirectoryStore(tmp_path)
    assert list((tmp_path / ".tmp").iterdir()) == []
