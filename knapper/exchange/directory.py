"""The exchange in a local directory of plain files. A generation is the SHA-256 of the bytes."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal

from knapper.errors import InvalidField, NotFound, StoreError, TooLarge
from knapper.exchange import SEND_AGAIN, Blob, Entries, ListedObject, Signed
from knapper.store import NAME_CHARS_MAX, check_name, files, private

FOLDERS = ("inbox", "jobs", "uploads")
_TEMPORARY = ".publishing-"  # the prefix of unfinished files; no object has it
_HASHED_MAX = 10_000
_CHUNK_BYTES = 1024 * 1024  # of reads and writes
_FOLDERS_MAX = 8  # more than any object needs


class OpenedFile:
    """An open file, which stays readable when another takes its name."""

    def __init__(self, entry: ListedObject, file: BufferedReader) -> None:
        self.entry = entry
        self.file = file

    async def read(self, begin: int, end: int) -> AsyncIterator[bytes]:
        try:
            self.file.seek(begin)
            while begin < end:
                data = await asyncio.to_thread(self.file.read, min(_CHUNK_BYTES, end - begin))
                if not data:
                    raise StoreError(f"{self.entry.name} was cut while it was read")
                begin += len(data)
                yield data
        finally:
            self.file.close()

    def close(self) -> None:
        self.file.close()


class DirectoryExchange:
    """`inbox/`, `jobs/` and `uploads/` below `root`. Symbolic links are not followed: a writer of the inbox could
    otherwise have other files read.

    Every folder is opened by its parent's descriptor, so that none can be swapped for a link meanwhile. All but the
    inbox is for this account alone; the operator sets the mode of `inbox/`.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._hashed: dict[str, tuple[tuple[int, int, int], str]] = {}  # by size, time and inode
        try:
            private.make(self._root / "jobs")
            private.make(self._root / "uploads")
            (self._root / "inbox").mkdir(mode=0o700, exist_ok=True)
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

    async def open(self, name: str) -> OpenedFile | None:
        return await asyncio.to_thread(self._open_file, name)

    async def list(self, prefix: str) -> Entries:
        return await asyncio.to_thread(self._list, prefix)

    async def entry(self, name: str) -> ListedObject | None:
        """The object's entry in a list, or None."""
        return await asyncio.to_thread(self._entry_of, name)

    async def publish(self, name: str, data: bytes) -> None:
        await asyncio.to_thread(self._publish, name, data)

    async def extend(self, name: str, data: bytes) -> None:
        await asyncio.to_thread(self._extend, name, data)

    async def compose(self, name: str, parts: Sequence[str], sha256: str) -> None:
        await asyncio.to_thread(self._compose, name, parts, sha256)

    async def presign(self, method: Literal["GET", "PUT"], name: str, bytes_max: int) -> Signed | None:
        del method, name, bytes_max  # no URL leads into a directory
        return None

    async def remove(self, name: str) -> None:
        await asyncio.to_thread(self._remove, name)

    @contextmanager
    def _folder(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """(descriptor of the object's folder, its name there). Raises StoreError for a link anywhere in the path."""
        *folders, last = _parts(name)
        with self._below(folders, make=make) as folder:
            yield folder, last

    @contextmanager
    def _below(self, folders: Sequence[str], *, make: bool = False) -> Iterator[int]:
        try:
            with files.below(self._root, folders, make=make) as folder:
                yield folder
        except files.UnexpectedSymlink as error:
            raise StoreError(
                f"{error.filename} in {self._root.joinpath(*folders)} is a symbolic link, and symbolic links are not "
                "followed; put the file or folder itself there"
            ) from error

    def _open(self, folder: int, name: str) -> BufferedReader | None:
        try:
            return files.read(folder, name)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def _read(self, name: str, bytes_max: int) -> Blob | None:
        try:
            with self._folder(name) as (folder, last):
                file = self._open(folder, last)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot read {name}: {error.strerror}") from error
        if file is None:
            return None
        with file:
            data = file.read(bytes_max + 1)
        if len(data) > bytes_max:
            raise TooLarge(f"{name} has over {bytes_max} bytes, the most that is read; split it, or leave some out")
        return Blob(data, hashlib.sha256(data).hexdigest())

    def _open_file(self, name: str) -> OpenedFile | None:
        try:
            with self._folder(name) as (folder, last):
                file = self._open(folder, last)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot read {name}: {error.strerror}") from error
        return None if file is None else OpenedFile(self._described(file, name), file)

    def _list(self, prefix: str) -> Entries:
        above = prefix.rpartition("/")[0] or FOLDERS[0]
        try:
            with self._below(_parts(above)) as folder:
                entries = [*self._walk(folder, above, prefix)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StoreError(f"cannot list {above}: {error.strerror}") from error
        return sorted(entries, key=lambda entry: entry.name)

    def _walk(self, top: int, above: str, prefix: str) -> Iterator[ListedObject]:
        for name, folder, last in files.regular(top, above, _FOLDERS_MAX):
            whole = not last.startswith(_TEMPORARY) and len(name) <= NAME_CHARS_MAX
            if whole and name.startswith(prefix):
                with suppress(files.UnexpectedSymlink, PermissionError):  # no file any more, or unreadable
                    if (entry := self._entry(folder, last, name)) is not None:
                        yield entry

    def _entry_of(self, name: str) -> ListedObject | None:
        try:
            with self._folder(name) as (folder, last):
                return self._entry(folder, last, name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot read {name}: {error.strerror}") from error

    def _entry(self, folder: int, last: str, name: str) -> ListedObject | None:
        file = self._open(folder, last)
        if file is None:
            return None
        with file:
            return self._described(file, name)

    def _described(self, file: BufferedReader, name: str) -> ListedObject:
        status = os.fstat(file.fileno())
        identity = (status.st_size, status.st_mtime_ns, status.st_ino)
        cached = self._hashed.get(name)
        if cached is None or cached[0] != identity:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if len(self._hashed) >= _HASHED_MAX:
                self._hashed.clear()
            cached = self._hashed[name] = (identity, digest)
        return ListedObject(name, cached[1], status.st_size, sha256=cached[1], modified_at=status.st_mtime)

    def _publish(self, name: str, data: bytes) -> None:
        with self._replacement(name) as file:
            file.write(data)

    @contextmanager
    def _replacement(self, name: str) -> Iterator[BinaryIO]:
        """A file that appears under the name atomically. Raises StoreError."""
        try:
            with self._folder(name, make=True) as (folder, last):
                readers = os.fstat(folder).st_mode & 0o044  # accounts that may list the folder may read its files
                with files.replacement(folder, last, prefix=_TEMPORARY, mode=0o600 | readers) as file:
                    yield file
        except OSError as error:
            raise StoreError(f"cannot write {name}: {error.strerror}") from error

    def _extend(self, name: str, data: bytes) -> None:
        try:
            with self._folder(name, make=True) as (folder, last):
                extended = files.extend(folder, last, data)
        except OSError as error:
            raise StoreError(f"cannot write {name}: {error.strerror}") from error
        if not extended:
            self._publish(name, data)

    def _compose(self, name: str, parts: Sequence[str], sha256: str) -> None:
        digest = hashlib.sha256()
        with self._replacement(name) as whole:
            for part in parts:
                source = self._open_file(part)
                if source is None:
                    raise NotFound(f"{part} is not there")
                with source.file as file:
                    while data := file.read(_CHUNK_BYTES):
                        digest.update(data)
                        whole.write(data)
            if digest.hexdigest() != sha256:
                raise InvalidField("sha256", sha256, f"that of the bytes that came, {digest.hexdigest()}", SEND_AGAIN)

    def _remove(self, name: str) -> None:
        try:
            with self._folder(name) as (folder, last):
                os.unlink(last, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(f"cannot remove {name}: {error.strerror}") from error


def _parts(name: str) -> list[str]:
    """The segments of a name. Raises ValueError for one outside of the exchange."""
    parts = check_name(name).split("/")
    if parts[0] not in FOLDERS:
        raise ValueError(f"bad name {name!r}: it begins with {' or '.join(f'{folder}/' for folder in FOLDERS)}")
    return parts
