"""The store in a local directory.

Durable through fsync, exclusive through link(2). Any number of processes may share it, and each may die at any line. An
existing object may thus not be durable yet, and a process makes it so before it relies on it: an object has two names
until its directory was synced, and a directory has a mark until its parent was.
"""

import asyncio
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from knapper.errors import StoreError
from knapper.store import Names, check_name, files, private

_TEMPORARY = ".tmp"
_SMALL_BYTES = 64 * 1024
_UNSYNCED = stat.S_ISVTX  # the mark of a directory whose name may not be durable; it has no other use here
_SYNCED_MAX = 16384
_AT_ONCE: int | None = getattr(os, "RWF_NOWAIT", None)  # Linux: read what the page cache has, or nothing


class DirectoryStore:
    """Object `a/b/c` is the file `a/b/c`. No object's name may be a directory of another's (`a` beside `a/b`)."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()
        self._temporary = self._root / _TEMPORARY
        self._synced = set[tuple[int, int]]()  # objects with two names that were made durable here
        try:
            private.make(self._root)
            self._temporary.mkdir(exist_ok=True)
            for directory in (self._root, *self._root.parents):
                with suppress(PermissionError):  # an unreadable directory is not of this account's making
                    _sync_directory(directory)
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
        if self._exists(path):  # the usual case of a retry, without the cost of a write
            return False
        created = unsynced = False
        temporary = self._temporary / files.random_name()
        try:
            with files.create_locked(temporary) as file:  # until it has its name: an unlocked file is a torn write
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                created = unsynced = self._link(temporary, path)
                if created:
                    _sync_directory(path.parent)
                    unsynced = False
            if not created:
                self._exists(path)
            return created
        except OSError as error:
            raise _explained(error, f"write {path}") from error
        finally:
            if not unsynced:
                with suppress(OSError):  # a file that is left here is removed at the next start
                    temporary.unlink(missing_ok=True)

    def _exists(self, path: Path) -> bool:
        """Whether the name is taken. If so, the object is durable on return, even if its writer died."""
        try:
            status = path.stat()
            self._make_durable(path, status)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _explained(error, f"sync {path}") from error
        return True

    def _make_durable(self, path: Path, status: os.stat_result) -> None:
        """Sync the directory of an existing object; its bytes were synced before it got this name."""
        if status.st_nlink == 1 or stat.S_ISDIR(status.st_mode):
            return
        identity = status.st_ino, status.st_mtime_ns  # a backup by hard links gives all objects more names
        if identity not in self._synced:
            _sync_directory(path.parent)
            if len(self._synced) >= _SYNCED_MAX:
                self._synced.clear()
            self._synced.add(identity)

    def _link(self, temporary: Path, path: Path) -> bool:
        """Give the file its name. False if that is taken."""
        while True:
            self._make_directory(path.parent)
            try:
                os.link(temporary, path)
                return True
            except FileExistsError:
                return False
            except FileNotFoundError:  # a deletion of its last object removed the directory
                if not temporary.exists():
                    raise

    def _get(self, path: Path) -> bytes | None:
        try:
            with path.open("rb") as file:
                self._make_durable(path, os.fstat(file.fileno()))
                return file.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise _explained(error, f"read {path}") from error

    def _list(self, prefix: str, start_after: str, limit: int) -> Names:
        folder, _, _ = prefix.rpartition("/")
        try:
            names = self._walk(folder, prefix, start_after)
            return list(islice(names, limit) if limit else names)
        except OSError as error:
            raise _explained(error, f"list {prefix!r}") from error

    def _walk(self, folder: str, prefix: str, start_after: str) -> Iterator[str]:
        """The names in order; reads no directory of names that are not asked for, or past a limit."""
        below = f"{folder}/" if folder else ""
        first = start_after[len(below) :].partition("/")[0] if start_after.startswith(below) else ""
        try:
            with os.scandir(self._root / folder) as entries:
                found = [
                    name if entry.is_dir(follow_symlinks=False) else name[:-1]
                    for entry in entries
                    if (entry.name >= first or first.startswith(entry.name))  # most of a long directory, cheaply
                    and _may_hold(name := f"{below}{entry.name}/", prefix, start_after)
                ]
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in sorted(found):  # a directory by its `/`
            if not name.endswith("/"):
                if name.startswith(prefix) and name > start_after:
                    yield name
            elif name != f"{_TEMPORARY}/":
                yield from self._walk(name[:-1], prefix, start_after)

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
            _sync_directory(self._remove_empty(path.parent))
        except NotADirectoryError:
            return
        except OSError as error:
            raise _explained(error, f"delete {path}") from error

    def _remove_empty(self, directory: Path) -> Path:
        """Remove the directory and its parents while they are empty; return the first that is left."""
        while directory != self._root:
            try:
                directory.rmdir()
            except FileNotFoundError:  # removed by another process, or never created
                pass
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                return directory
            directory = directory.parent
        return directory

    def _make_directory(self, directory: Path) -> None:
        """Create the directory, durably. It may be gone on return: deletions remove empty directories."""
        while True:
            try:
                if not directory.stat().st_mode & _UNSYNCED:
                    return
                _sync_new_directory(directory)
            except FileNotFoundError:
                self._make_directory(directory.parent)
                with suppress(FileNotFoundError, FileExistsError):
                    directory.mkdir(0o700 | _UNSYNCED)


def _may_hold(directory: str, prefix: str, start_after: str) -> bool:
    """Whether a name below `directory`, which ends in `/`, or its own without that, may be asked for."""
    if not (directory.startswith(prefix) or prefix.startswith(directory)):
        return directory[:-1] == prefix
    return directory > start_after or start_after.startswith(directory)


def _in_memory(path: Path) -> bytes | None:
    """The bytes of a small file in the page cache, or None if reading it may need the disk.

    Half of all reads are for an operation that has not arrived, or was written a moment ago; a thread for each would
    cost ten times the read. Raises OSError if there is no file.
    """
    if _AT_ONCE is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            if status.st_nlink != 1:  # it may have to be made durable first
                return None
            data = bytearray(min(status.st_size, _SMALL_BYTES + 1))
            whole = len(data) <= _SMALL_BYTES and os.preadv(descriptor, [data], 0, _AT_ONCE) == len(data)
            return bytes(data) if whole else None
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise
    except OSError:  # not in the page cache, or unknown to this file system; other errors come again in the thread
        return None


def _sync_new_directory(directory: Path) -> None:
    """Make its name durable, then remove its mark. Raises FileNotFoundError if it is gone."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _sync_directory(directory.parent)
        os.fchmod(
            descriptor, stat.S_IMODE(os.fstat(descriptor).st_mode) & ~_UNSYNCED
        )  # by descriptor: its path may be another's by now
    finally:
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    """Sync the directory, or the nearest parent if it was removed with its last object."""
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
