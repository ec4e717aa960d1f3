"""What runs now, for operators and tests, and the lock that keeps a data directory to one supervisor."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from knapper.errors import InvalidField
from knapper.jobs.presence import Presence
from knapper.store import files, private

ENGINES = ("train_step", "sample")  # what has the base model in memory, in one process or in two


def role_of(process: str, model: str) -> str:
    """The role of a process of one of several base models; of the only one, it is the process's name."""
    return f"{process}:{model}"


class ProcessTable:
    """`run/processes.json`: {role: {"pid": ..., "port": ...}}, replaced whole at each change; some serve no port.

    A process that does not answer yet has "loading_since" besides, in seconds since the epoch.
    """

    def __init__(self, run_directory: Path) -> None:
        self._path = run_directory / "processes.json"
        self._roles: dict[str, dict[str, int]] = {}

    def set(self, role: str, pid: int, port: int | None = None, loading_since: float | None = None) -> None:
        self._roles[role] = {"pid": pid} if port is None else {"pid": pid, "port": port}
        if loading_since is not None:
            self._roles[role]["loading_since"] = int(loading_since)
        self._write()

    def remove(self, role: str) -> None:
        self._roles.pop(role, None)
        self._write()

    def clear(self) -> None:
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        with files.directory(self._path.parent) as folder:
            files.replace(folder, self._path.name, (json.dumps(self._roles, indent=2) + "\n").encode())


def presence(run_directory: Path, function: str, base_model: str) -> Presence | None:
    """Whether a process of this machine serves the function for the base model; None where no `knapper up` runs, as on
    a cluster.
    """
    serving = ("engine", function) if function in ENGINES else (function,)
    named = {role for name in serving for role in (name, role_of(name, base_model))}
    return _presence(run_directory, lambda role, _: role in named)


def presence_at(run_directory: Path, url: str) -> Presence | None:
    """Whether a process of this machine serves the function at this URL; None where no `knapper up` runs."""
    port = urlsplit(url).port
    return _presence(run_directory, lambda _, process: process.get("port") == port)


def _presence(run_directory: Path, sought: Callable[[str, dict[str, int]], bool]) -> Presence | None:
    try:
        roles = msgspec.json.decode((run_directory / "processes.json").read_bytes(), type=dict[str, dict[str, int]])
    except (OSError, msgspec.MsgspecError):
        return None
    process = next((process for role, process in roles.items() if sought(role, process)), None)
    if process is None:
        return Presence("absent")
    since = process.get("loading_since")
    return Presence("ready") if since is None else Presence("loading", float(since))


@contextmanager
def locked(data: Path, run_directory: Path) -> Iterator[None]:
    """This process alone uses the data directory. Raises InvalidField if another does, or it cannot be written."""
    try:
        private.make(data, passable=private.shared(data / "inbox"))
        private.make(run_directory)
        file = files.open_or_create(run_directory / "lock")
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
