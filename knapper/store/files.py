"""Atomic file writes, in directories without symbolic links: other writers of a directory cannot redirect them.

A temporary file has a random name that must be new, is readable by this account alone, and is locked while its writer
lives. So neither a link under its name nor a process with the same pid in another container does harm.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from secrets import token_hex  # noqa: TID251 - names that cannot be guessed, and are never replayed
from typing import BinaryIO

_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OR_NEW = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_OURS = 0o600
_OF_UMASK = 0o666


class UnexpectedSymlink(OSError):
    """A symbolic link in place of a directory or file."""


def random_name(prefix: str = "") -> str:
    return prefix + token_hex(16)


@contextmanager
def create_locked(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, locked until the context ends. Raises FileExistsError if a file or link has the name."""
    while True:
        descriptor = os.open(path, os.O_RDWR | _NEW, _OURS)
        with os.fdopen(descriptor, "w+b") as file:
            lock(descriptor)
            if not os.fstat(descriptor).st_nlink:  # another process removed it as torn before the lock
                continue
            yield file
            return


def open_or_create(path: Path) -> BinaryIO:
    """The file, to read and write. Raises OSError for a link."""
    return os.fdopen(os.open(path, os.O_RDWR | _OR_NEW, _OURS), "r+b")


def create(path: Path) -> BinaryIO:
    """A new file to write, with the rights of the account's umask, in place of a file or link of that name."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | _NEW, _OF_UMASK), "wb")


def append(path: Path) -> BinaryIO:
    """The file, to write at its end, with the rights of the account's umask. Raises OSError for a link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | _OR_NEW, _OF_UMASK), "ab")


def forget_torn(path: Path) -> None:
    """Remove a temporary file whose writer has died."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if is_torn(descriptor):
            if os.fstat(descriptor).st_nlink > 1:  # its other name may not be durable, as this one shows
                os.sync()
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def lock(descriptor: int) -> None:
    """Lock the file until it is closed. On a file system without locks, `is_torn` is never true either."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # `is_torn` of another process has it for a moment


def is_torn(descriptor: int) -> bool:
    """Whether no writer has the file locked. If so, it is locked here, and torn for no other process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor of the directory. Follows links: the path comes from the operator."""
    descriptor = os.open(path, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def below(root: Path, folders: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of root/a/b, where neither a nor b is a link, even if other processes change them meanwhile.

    `make`: create missing directories, durably and for this account alone. Raises UnexpectedSymlink,
    FileNotFoundError or NotADirectoryError.
    """
    descriptor = os.open(root, _FOLDER)
    try:
        for folder in folders:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o700, dir_fd=descriptor)
            inner = _open(folder, _FOLDER, descriptor)
            if make:  # also for a directory whose creator died before this
                os.fsync(descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def within(folder: int, name: str) -> Iterator[int]:
    """A descriptor of the directory `name` in `folder`. Raises as `below` does."""
    descriptor = _open(name, _FOLDER, folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def regular(folder: int, path: str, folders_max: int) -> Iterator[tuple[str, int, str]]:
    """(path, folder, name) of each regular file below `folder`, whose path is `path`. Links are not followed.

    `folder` is an open descriptor until the next item. Unreadable folders, those deeper than `folders_max`, and names
    that are not UTF-8 are left out.
    """
    for entry in [*os.scandir(folder)]:
        full_path = f"{path}/{entry.name}"
        if not _is_text(full_path):
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                if folders_max > 0:
                    with within(folder, entry.name) as inner:
                        yield from regular(inner, full_path, folders_max - 1)
            elif entry.is_file(follow_symlinks=False):
                yield full_path, folder, entry.name
        except (UnexpectedSymlink, FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # it has just changed, or is unreadable


def read(folder: int, name: str) -> BufferedReader:
    """A regular file to read. Raises UnexpectedSymlink, FileNotFoundError, or IsADirectoryError for anything else."""
    descriptor = _open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, folder)  # do not block on a pipe
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)


def replace(folder: int, name: str, data: bytes, *, prefix: str = ".", mode: int = _OURS) -> None:
    """Write the file, durably and atomically. A link with this name is replaced, its target left alone."""
    with replacement(folder, name, prefix=prefix, mode=mode) as file:
        file.write(data)


@contextmanager
def replacement(folder: int, name: str, *, prefix: str = ".", mode: int = _OURS) -> Iterator[BinaryIO]:
    """As `replace`, with the bytes that are written to the file; an exception leaves the old file."""
    temporary = random_name(prefix)
    descriptor = os.open(temporary, os.O_WRONLY | _NEW, _OURS, dir_fd=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            yield file
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise


def extend(folder: int, name: str, data: bytes) -> bool:
    """Append the rest of `data` to a file that has its beginning, durably, in one write.

    False, without a change, if there is no file, it is no beginning of `data`, or it has another name beside this one.
    """
    try:
        descriptor = _open(name, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, folder)
    except OSError:
        return False
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        lock(descriptor)  # or two writers would append the same
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_size > len(data):
            return False
        if file.read() != data[: status.st_size]:
            return False
        rest = memoryview(data)[status.st_size :]
        while rest:  # once, unless the disk is full: then the next write says so
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    return True


def _open(name: str, flags: int, folder: int) -> int:
    try:
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=folder)
    except OSError as error:  # a link's error depends on the system and the flags
        if _is_link(name, folder):
            raise UnexpectedSymlink(errno.ELOOP, "symbolic links are not followed", name) from error
        raise


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # the name is not UTF-8
        return False
    return True
