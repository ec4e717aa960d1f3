"""Files that appear whole, in directories that no link leads out of: who may write beside them gains nothing by it.

What is under way has a random name that must be new, is for this account alone, and is held for as long as its writer
lives: neither a link that lies in wait nor a process of the same number in another container is ever met.
"""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from secrets import token_hex  # noqa: TID251 - names that nobody can guess: never replayed, and read by nobody
from typing import BinaryIO

_NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OURS = 0o600


class UnexpectedSymlink(OSError):
    """A symbolic link lies where a directory or a file was meant."""


def random_name(prefix: str = "") -> str:
    return prefix + token_hex(16)


@contextmanager
def beginning(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, held until this is left. Raises FileExistsError for a name that is taken, by any link."""
    while True:
        descriptor = os.open(path, os.O_RDWR | _NEW, _OURS)
        with os.fdopen(descriptor, "w+b") as file:
            hold(descriptor)
            if not os.fstat(descriptor).st_nlink:  # it was taken for torn before it was held
                continue
            yield file
            return


def opened(path: Path) -> BinaryIO:
    """A file to read and write, made if there is none, as it is. Raises OSError for a link."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _OURS), "r+b")


def forget_torn(path: Path) -> None:
    """Remove a file that was begun and whose writer lives no more."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if torn(descriptor):
            if os.fstat(descriptor).st_nlink > 1:  # its other name may not be durable: that this one is there says so
                os.sync()
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def hold(descriptor: int) -> None:
    """Lock it until it is closed here. Where a file system has no locks, nobody can take it for torn either."""
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # whoever looks whether it is torn has it for a moment


def torn(descriptor: int) -> bool:
    """Whether nobody holds what was begun; then nobody else takes it for torn until it is closed here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def directory(path: Path) -> Iterator[int]:
    """A descriptor of it. Links on the way are followed: whoever names this path put them there."""
    descriptor = os.open(path, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def below(root: Path, folders: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of root/a/b, in which neither a nor b is a link, whatever others do meanwhile.

    `make`: what is missing is made, durably, for this account alone. Raises Link, FileNotFoundError or
    NotADirectoryError.
    """
    descriptor = os.open(root, _FOLDER)
    try:
        for folder in folders:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o700, dir_fd=descriptor)
            inner = _open(folder, _FOLDER, descriptor)
            if make:  # also what somebody made who died before it was durable
                os.fsync(descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def within(folder: int, name: str) -> Iterator[int]:
    """A descriptor of a directory in it. Raises as `below` does."""
    descriptor = _open(name, _FOLDER, folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def regular(folder: int, path: str, folders_max: int) -> Iterator[tuple[str, int, str]]:
    """(path, folder, name) of each regular file below `folder`, which is `path`: links lead nowhere.

    Each one's folder is open until the next is asked for. Left out is what this account may not look into, what lies
    deeper than `folders_max` folders, however deep somebody dug, and what has a name that is no text.
    """
    for entry in [*os.scandir(folder)]:
        where = f"{path}/{entry.name}"
        if not _is_text(where):
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                if folders_max > 0:
                    with within(folder, entry.name) as inner:
                        yield from regular(inner, where, folders_max - 1)
            elif entry.is_file(follow_symlinks=False):
                yield where, folder, entry.name
        except (UnexpectedSymlink, FileNotFoundError, NotADirectoryError, PermissionError):
            continue  # it was something else a moment ago, or is somebody's own


def read(folder: int, name: str) -> BufferedReader:
    """A regular file to read. Raises Link, FileNotFoundError, or IsADirectoryError for whatever else it is."""
    descriptor = _open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC, folder)  # a pipe must not be waited for
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)


def replace(folder: int, name: str, data: bytes, *, prefix: str = ".", mode: int = _OURS) -> None:
    """The file has these bytes, durably, and nobody sees half of them. A link there goes, and not what it leads to."""
    with replacement(folder, name, prefix=prefix, mode=mode) as file:
        file.write(data)


@contextmanager
def replacement(folder: int, name: str, *, prefix: str = ".", mode: int = _OURS) -> Iterator[BinaryIO]:
    """The same with what is written to the file by the end; if that raises, nothing is changed."""
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
    """Append, durably, what `data` has beyond the file, in one write. False, and nothing is done, where that is no way
    from the one to the other: there is no file, it does not begin `data`, or it has another name beside this one.
    """
    try:
        descriptor = _open(name, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, folder)
    except OSError:
        return False
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        hold(descriptor)  # or two writers would append the same
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
    except OSError as error:  # which error a link is depends on the system and the flags
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
    except UnicodeEncodeError:  # bytes of a name that are no UTF-8
        return False
    return True
