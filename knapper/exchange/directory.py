"""The exchange in a local directory: plain files, for people to look at. A generation is the sha256 of the bytes."""

import asyncio
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from io import BufferedReader
from pathlib import Path

from knapper.errors import StoreError, TooLarge
from knapper.exchange import Blob, Entries, Entry
from knapper.store import NAME_CHARS_MAX, check_name

FOLDERS = ("inbox", "jobs")
_TEMPORARY = ".publishing-"  # the beginning of a file that is still being written; no name of ours begins so
_HASHED_MAX = 10_000
_NUMBERS = itertools.count()  # of the process: two exchanges of it never write the same file


class DirectoryExchange:
    """`inbox/` and `jobs/` below `root`. Symbolic links are not followed: who may write here may not read elsewhere."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._hashed: dict[Path, tuple[tuple[int, int, int], str]] = {}  # by size, time and inode
        try:
            for folder in FOLDERS:
                (self._root / folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"cannot make {self._root}/inbox: {error.strerror}") from error

    @property
    def bucket(self) -> str:
        return "local"

    @property
    def prefix(self) -> str:
        return ""

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        return await asyncio.to_thread(self._read, name, bytes_max)

    async def list(self, prefix: str) -> Entries:
        return await asyncio.to_thread(self._list, prefix)

    async def entry(self, name: str) -> Entry | None:
        """The entry that a list has for the object, or None."""
        return await asyncio.to_thread(lambda: self._entry(self._path(name)))

    async def publish(self, name: str, data: bytes) -> None:
        await asyncio.to_thread(self._publish, name, data)

    async def remove(self, name: str) -> None:
        await asyncio.to_thread(self._remove, name)

    def _path(self, name: str) -> Path:
        if check_name(name).split("/")[0] not in FOLDERS:
            raise ValueError(f"bad name {name!r}: it begins with {' or '.join(f'{folder}/' for folder in FOLDERS)}")
        path = self._root / name
        for parent in path.parents:
            if parent == self._root:
                break
            if parent.is_symlink():
                raise StoreError(f"{parent} is a symbolic link; put the files themselves there")
        return path

    def _open(self, path: Path) -> BufferedReader | None:
        try:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path}: {error.strerror} (symbolic links are not followed)") from error

    def _read(self, name: str, bytes_max: int) -> Blob | None:
        file = self._open(self._path(name))
        if file is None:
            return None
        with file:
            try:
                data = file.read(bytes_max + 1)
            except IsADirectoryError:
                return None
            if len(data) > bytes_max:
                raise TooLarge(f"{name} has over {bytes_max} bytes, the most that is read; split it, or leave some out")
        return Blob(data, hashlib.sha256(data).hexdigest())

    def _list(self, prefix: str) -> Entries:
        folder = self._path(prefix.rpartition("/")[0] or FOLDERS[0])
        found = [entry for entry in self._walk(folder) if entry.name.startswith(prefix)]
        return sorted(found, key=lambda entry: entry.name)

    def _walk(self, folder: Path) -> Iterator[Entry]:
        """As deep as names go: below that lies nothing of ours, however deep somebody dug."""
        folders = [folder]
        while folders:
            for entry in self._scan(folders.pop()):
                path = Path(entry.path)
                if len(os.fspath(path)) - len(os.fspath(self._root)) > NAME_CHARS_MAX:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(path)
                    continue
                whole = entry.is_file(follow_symlinks=False) and not entry.name.startswith(_TEMPORARY)
                if whole and (made := self._entry(path)) is not None:
                    yield made

    def _scan(self, folder: Path) -> Sequence[os.DirEntry[str]]:
        try:
            return [*os.scandir(folder)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"cannot list {folder}: {error.strerror}") from error

    def _entry(self, path: Path) -> Entry | None:
        file = self._open(path)
        if file is None:
            return None
        with file:
            status = os.fstat(file.fileno())
            seen = (status.st_size, status.st_mtime_ns, status.st_ino)
            known = self._hashed.get(path)
            if known is None or known[0] != seen:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                if len(self._hashed) >= _HASHED_MAX:
                    self._hashed.clear()
                known = self._hashed[path] = (seen, digest)
        return Entry(path.relative_to(self._root).as_posix(), known[1], status.st_size)

    def _publish(self, name: str, data: bytes) -> None:
        path = self._path(name)
        temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{next(_NUMBERS)}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            self._sync_folders(path.parent)
        except OSError as error:
            raise StoreError(f"cannot write {path}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def _sync_folders(self, folder: Path) -> None:
        """Up to the root: who submits a job hears that its files are there, and whoever made a folder may have died."""
        for each in (folder, *folder.parents):
            descriptor = os.open(each, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if each == self._root:
                break

    def _remove(self, name: str) -> None:
        try:
            self._path(name).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise StoreError(f"cannot remove {name}: {error.strerror}") from error
