"""What runs now, for operators and tests, and the lock that keeps a data directory to one supervisor."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knapper.errors import InvalidField
from knapper.store import files, private


class Processes:
    """`run/processes.json`: {role: {"pid": ..., "port": ...}}, replaced whole at each change."""

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / "processes.json"
        self._roles: dict[str, dict[str, int]] = {}

    def set(self, role: str, pid: int, port: int) -> None:
        self._roles[role] = {"pid": pid, "port": port}
        self._write()

    def remove(self, role: str) -> None:
        self._roles.pop(role, None)
        self._write()

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        with files.directory(self._path.parent) as folder:
            files.replace(folder, self._path.name, (json.dumps(self._roles, indent=2) + "\n").encode())


@contextmanager
def locked(data: Path, run_directory: Path) -> Iterator[None]:
    """This process alone uses the data directory. Raises InvalidField if another does, or it cannot be written."""
    try:
        private.make(data, passable=private.shared(data / "inbox"))
        private.make(run_directory)
        file = files.opened(run_directory / "lock")
    except OSError as error:
        raise InvalidField("data", str(data), "a directory that can be written", str(error)) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidField(
                "data", str(data), "a directory that no other knapper uses",
                f"Process {file.read().decode().strip()} uses it: stop that one, or choose another with --data",
            ) from None  # fmt: skip
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        file.flush()
        yield
