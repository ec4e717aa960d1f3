"""A real `knapper up` of our own, and what its processes are."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from tests import instructions

Dtype = Literal["auto", "float32", "bfloat16"]

_STOP_S = 30.0


class Server:
    """One `knapper up` over `data`, running from `start` to `stop`; it can be killed and brought up again between.

    Its dtype is not the machine's choice, unless a test asks for `auto`: what is compared says what computed it.
    Its standard error is in `log_path`, beside the data directory, and survives restarts.
    """

    def __init__(
        self,
        model: Path,
        data: Path,
        *flags: str,
        settings: Mapping[str, str] | None = None,
        python: str = sys.executable,
        dtype: Dtype = "float32",
    ) -> None:
        self.data = data
        self.dtype = dtype
        self.url = ""
        self.log_path = data.with_name(f"{data.name}.log")
        self._model, self._flags, self._settings, self._python = model, flags, settings or {}, python
        self._process: subprocess.Popen[str] | None = None

    @classmethod
    def start(
        cls,
        model: Path,
        data: Path,
        *flags: str,
        settings: Mapping[str, str] | None = None,
        python: str = sys.executable,
        dtype: Dtype = "float32",
    ) -> Self:
        """A server that answers. `flags` go to `knapper up` as they are, `settings` as environment variables.

        `python`: of the environment that serves, where that is another one.
        """
        server = cls(model, data, *flags, settings=settings, python=python, dtype=dtype)
        server.up()
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def up(self) -> None:
        """Bring it up, after a kill at the port that it had. Returns once it answers."""
        port = self.url.rpartition(":")[2] or "0"
        command = [self._python, "-m", "knapper", "up", "--model", str(self._model), "--data", str(self.data)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KNAPPER_")}
        environment = {**inherited, "KNAPPER_DTYPE": self.dtype, **self._settings, "OMP_NUM_THREADS": "1"}
        with self.log_path.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, "--port", port, *self._flags],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        assert self._process.stdout is not None
        with self._process.stdout as said:
            for line in said:
                if line.startswith("ready: "):
                    self.url = line.removeprefix("ready: ").strip()
                    return
        raise AssertionError(f"knapper did not start (exit {self._process.wait()}):\n{self.log()[-4000:]}")

    def stop(self, by: signal.Signals = signal.SIGINT) -> int:
        """End it as Ctrl-C does, and return its exit status. Nothing happens to one that has ended."""
        if self._process is None:
            return 0
        instructions.note_log(self.log())
        if self._process.poll() is None:
            self._process.send_signal(by)
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"knapper did not stop within {_STOP_S:.0f} s:\n{self.log()[-4000:]}") from None

    def kill(self, role: str = "supervisor") -> int:
        """`kill -9` one of `processes`, and return its pid once it is gone. Of the supervisor: all of it, at once."""
        pid = self.processes()[role]
        everyone = list(self.processes().values()) if role == "supervisor" else [pid]
        os.kill(pid, signal.SIGKILL)
        if role == "supervisor":
            assert self._process is not None
            self._process.wait()
        wait_until(lambda: not any(running(each) for each in everyone), f"{role} is gone")
        return pid

    def processes(self) -> dict[str, int]:
        """Pids by role: supervisor, gateway, and the engine (or train_step and sample) while there is work."""
        found = json.loads((self.data / "run" / "processes.json").read_text(encoding="utf-8"))
        return {role: process["pid"] for role, process in found.items()}

    def members(self, role: str) -> list[int]:
        """Pids of the process of that role and of those that it has started."""
        pid = self.processes()[role]
        return sorted({pid, *group(pid)})

    def ports(self) -> dict[str, int]:
        """Of the processes that listen on one, by role."""
        found = json.loads((self.data / "run" / "processes.json").read_text(encoding="utf-8"))
        return {role: process["port"] for role, process in found.items() if process.get("port")}

    def log(self) -> str:
        """What it wrote to standard error so far, in all its lives."""
        return self.log_path.read_text(encoding="utf-8")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
    """Return once the condition holds; fail after `timeout_s`, saying that `what` did not come true."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.02)


def group(leader: int) -> list[int]:
    """Pids that run in a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        pid = int(path.name)
        try:
            if os.getpgid(pid) == leader and running(pid):
                found.append(pid)
        except ProcessLookupError:
            pass  # it has ended
    return found


def running(pid: int) -> bool:
    """Whether the process runs; one that waits for its parent to notice its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
