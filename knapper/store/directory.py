"""The store in a local directory.

Durable through fsync, exclusive through link(2). Any number of processes may share it.
"""

import asyncio
import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from knapper import files, private
from knapper.errors import StoreError
from knapper.store import Names, check_name

_TEMPORARY = ".tmp"
_SMALL_BYTES = 64 * 1024
_AT_ONCE: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux: read what the page cache has, or nothing


class DirectoryStore:
    """Object `a/b/c` is the file `a/b/c`.

    No object's name may be the beginning of another's path (`a` beside `a/b`).
    """

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._temporary = self._root / _TEMPORARY
        try:
            private.make(self._root)
            self._temporary.mkdir(exist_ok=True)
            for torn in self._temporary.iterdir():  # nothing refers to it
                files.forget_torn(torn)
        except OSError as error:
            raise _explained(error, f"open the store at {self._root}") from error

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        return await asyncio.to_thread(self._put, self._path(name), data)

    async def get(self, name: str) -> bytes | None:
        path = self._path(name)
        try:
            data = _in_memory(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        return await asyncio.to_thread(self._get, path) if data is None else data

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        return await asyncio.to_thread(self._list, prefix, start_after, limit)

    async def delete(self, name: str) -> None:
        await asyncio.to_thread(self._delete, self._path(name))

    def _path(self, name: str) -> Path:
        if check_name(name).startswith(_TEMPORARY + "/"):
            raise ValueError(f"bad object name {name!r}: {_TEMPORARY}/ is the store's own")
        return self._root / name

    def _put(self, path: Path, data: bytes) -> bool:
        if path.exists():  # the usual fate of a retry, without the cost of a write
            return False
        temporary = self._temporary / files.random_name()
        try:
            with files.beginning(temporary) as file:  # until it has its name: a torn write is one that nobody holds
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                if not self._link(temporary, path):
                    return False
            _sync_directory(path.parent)
            return True
        except OSError as error:
            raise _explained(error, f"write {path}") from error
        finally:
            with suppress(OSError):  # what is left here is forgotten at the next start
                temporary.unlink(missing_ok=True)

    def _link(self, temporary: Path, path: Path) -> bool:
        """Give the file its name. False if that is taken."""
        while True:
            self._make_directory(path.parent)
            try:
                os.link(temporary, path)
                return True
            except FileExistsError:
                return False
            except FileNotFoundError:  # whoever deleted the last object of the directory took that along
                if not temporary.exists():
                    raise

    def _get(self, path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise _explained(error, f"read {path}") from error

    def _list(self, prefix: str, start_after: str, limit: int) -> Names:
        folder, _, _ = prefix.rpartition("/")
        try:
            names = sorted(
                name for name in self._walk(folder, prefix) if name.startswith(prefix) and name > start_after
            )
        except OSError as error:
            raise _explained(error, f"list {prefix!r}") from error
        return names[:limit] if limit else names

    def _walk(self, folder: str, prefix: str) -> Iterator[str]:
        try:
            entries = [*os.scandir(self._root / folder)]
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if name == _TEMPORARY:
                continue
            if not entry.is_dir(follow_symlinks=False):
                yield name
            elif name.startswith(prefix) or prefix.startswith(name):
                yield from self._walk(name, prefix)

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            _sync_directory(self._without_empty(path.parent))
        except NotADirectoryError:
            return
        except OSError as error:
            raise _explained(error, f"delete {path}") from error

    def _without_empty(self, directory: Path) -> Path:
        """Remove the directory and those around it, as far as they are empty; return the first that is left."""
        while directory != self._root:
            try:
                directory.rmdir()
            except FileNotFoundError:  # another was faster, or it never was
                pass
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return directory
            directory = directory.parent
        return directory

    def _make_directory(self, directory: Path) -> None:
        """It may be gone again on return: whoever deletes takes empty ones along."""
        while not directory.is_dir():
            self._make_directory(directory.parent)
            with suppress(FileNotFoundError):
                directory.mkdir(exist_ok=True)
                _sync_directory(directory.parent)


def _in_memory(path: Path) -> bytes | None:
    """The bytes of a small file that needs no disk to be read; None if it does, or if that cannot be told.

    Half of all reads look for an operation that has not come, or was written a moment ago: a thread for each of them
    would cost ten times the read. Raises OSError for a path at which there is no file.
    """
    if _AT_ONCE is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            data = bytearray(min(os.fstat(descriptor).st_size, _SMALL_BYTES + 1))
            whole = len(data) <= _SMALL_BYTES and os.preadv(descriptor, [data], 0, _AT_ONCE) == len(data)
            return bytes(data) if whole else None
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except (
        OSError
    ):  # it is not in memory, or this file system does not say; whatever else it is, the thread meets again
        return None


def _sync_directory(directory: Path) -> None:
    """If it is gone by now, with the last of its objects, then the first around it that is there."""
    while True:
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            directory = directory.parent
            continue
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return


def _explained(error: OSError, doing: str) -> StoreError:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space, everything acknowledged so far is safe",
        errno.EDQUOT: "the disk quota is used up; everything acknowledged so far is safe",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied; check the owner and mode of the data directory",
    }
    reason = reasons.get(error.errno or 0, str(error))
    return StoreError(f"cannot {doing}: {reason}", retry_after_s=5.0)
