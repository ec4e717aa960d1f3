"""A disk that loses what was not synced: real files, and a power cut that drops or tears the rest, by a seeded die.

    with Disk(tmp_path, random.Random(7)) as disk:
        store = DirectoryStore(disk.root)
        ...
        disk.cut()                              # root is another directory now: what a machine finds that starts again
        store = DirectoryStore(disk.root)

Only `os.fsync` and `os.sync` are looked at. What they were told of survives as it was then: of a file its bytes, of a
directory its names. Of everything else it is drawn, for each name and each file: as it was when it was synced last, as
it is now, or, of bytes, something in between. That is what POSIX promises, and no more.
"""

import os
import random
import resource
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_BEGUN = ".tmp"


@dataclass
class _Synced:
    """What is known of an inode since it was synced. It is held open, so that no other gets its number."""

    descriptor: int
    data: bytes = b""
    names: dict[str, int] = field(default_factory=dict)  # of a directory: the inodes of its entries


class Disk:
    """`before_sync` is called before each sync takes effect: whatever it raises happens instead."""

    def __init__(self, scratch: Path, draw: random.Random, before_sync: Callable[[], None] = lambda: None) -> None:
        self._scratch, self._draw, self.before_sync = scratch, draw, before_sync
        self._synced: dict[int, _Synced] = {}
        self._fsync, self._sync = os.fsync, os.sync
        self.cuts = self.syncs = self.dropped = self.torn = 0
        self.root = scratch / "0"

    def __enter__(self) -> Self:
        most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most[1], most[1]))
        self.root.mkdir()
        os.fsync, os.sync = self._on_fsync, self._on_sync  # type: ignore[assignment]  # only descriptors are given
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync, os.sync = self._fsync, self._sync
        self._forget()

    def cut(self) -> None:
        """The power goes, and comes back: `root` is what is found then, all of it durable."""
        self.cuts += 1
        after = self._scratch / str(self.cuts)
        after.mkdir()
        self._survive(self.root, after)
        self._forget()
        shutil.rmtree(self.root)
        self.root = after
        self._record(after)
        for folder, _, _ in os.walk(after):
            for entry in os.scandir(folder):
                self._record(Path(entry.path))

    def _on_fsync(self, descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_relative_to(self._scratch):
            self.before_sync()
            self.syncs += 1
            self._remember(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY))

    def _on_sync(self) -> None:
        self.before_sync()
        self.syncs += 1
        for folder, folders, names in os.walk(self.root):
            for name in (*folders, *names):
                self._record(Path(folder, name))
        self._record(self.root)

    def _record(self, path: Path) -> None:
        self._remember(os.open(path, os.O_RDONLY))

    def _remember(self, descriptor: int) -> None:
        status = os.fstat(descriptor)
        if status.st_ino in self._synced:
            os.close(descriptor)
        else:
            self._synced[status.st_ino] = _Synced(descriptor)
        synced = self._synced[status.st_ino]
        if stat.S_ISDIR(status.st_mode):
            synced.names = {entry.name: entry.inode() for entry in os.scandir(synced.descriptor)}
        else:
            synced.data = os.pread(synced.descriptor, status.st_size, 0)

    def _forget(self) -> None:
        for synced in self._synced.values():
            os.close(synced.descriptor)
        self._synced = {}

    def _survive(self, now: Path, after: Path) -> None:
        """Fill `after` with what is left of the directory that is `now`."""
        if now.name == _BEGUN:  # unfinished files do not count; their names are random, and would change the draws
            return
        there = {entry.name: entry for entry in os.scandir(now)}
        was = self._synced[now.stat().st_ino].names if now.stat().st_ino in self._synced else {}
        for name in sorted(there.keys() | was.keys()):
            entry = there.get(name)
            if (entry.inode() if entry else None) == was.get(name) or self._draw.random() < 0.5:
                if entry is not None:
                    self._keep(Path(entry.path), after / name)
            elif (before := was.get(name)) is None:
                self.dropped += 1
            else:  # deleted, and that was not synced: it is there again
                self._bring_back(self._synced.get(before), after / name)

    def _keep(self, now: Path, after: Path) -> None:
        status = now.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode):
            after.mkdir()
            after.chmod(stat.S_IMODE(status.st_mode))
            self._survive(now, after)
            return
        synced, data = self._synced.get(status.st_ino), now.read_bytes()
        if synced is None or synced.data != data:
            data = self._tear(b"" if synced is None else synced.data, data)
        after.write_bytes(data)

    def _tear(self, before: bytes, now: bytes) -> bytes:
        self.torn += 1
        cut = self._draw.randrange(len(now) + 1)
        return self._draw.choice((before, now, now[:cut], now[:cut] + bytes(len(now) - cut)))

    def _bring_back(self, synced: _Synced | None, after: Path) -> None:
        if synced is None:  # it was never synced itself
            after.write_bytes(b"")
        elif stat.S_ISDIR(os.fstat(synced.descriptor).st_mode):
            after.mkdir()
            for name, inode in synced.names.items():
                self._bring_back(self._synced.get(inode), after / name)
        else:
            after.write_bytes(synced.data)
