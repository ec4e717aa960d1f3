"""One mutant's trial: a process that imports the mutated module in the place of the file's, and runs its tests.

Forked off one that has loaded what all tests need, so that a trial takes about as long as its tests do.
"""

import ast
import importlib
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Literal

import pytest

from tests.mutants.modules import MODULES, NOT

Verdict = Literal["killed", "slow", "survived"]
ROOT = Path(__file__).parents[2]
_WAIT_S = 400.0  # of a trial that waits for what does not come; on a busy machine, of any
_LOADED = "ignore::pytest.PytestAssertRewriteWarning"  # plugins that were loaded before the fork
_HEAVY = (
    "numpy",
    "torch",
    "pytest",
    "hypothesis",
    "starlette",
    "msgspec",
    "httpx",
    "uvicorn",
    "jwt",
    "prometheus_client",
)


def warm_up() -> None:
    """Load what takes long and is not ours. Nothing of knapper: each trial imports that for itself."""
    for name in _HEAVY:
        importlib.import_module(name)


class _Finder(importlib.machinery.SourceFileLoader):
    """Finds one module, and gives it another tree than its file's."""

    def __init__(self, name: str, path: str, tree: ast.Module) -> None:
        super().__init__(name, path)
        self._tree = tree

    def find_spec(self, name: str, _path: object = None, _target: ModuleType | None = None) -> object:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, _name: str) -> CodeType:
        return compile(self._tree, self.path, "exec")


@dataclass
class Trial:
    """Under way. `end` says how it went, `cpu_s` then how much it computed."""

    pid: int
    output: Path
    until: float
    cpu_s: float = 0.0

    def end(self, wait: bool = False) -> Verdict | None:
        """None while it goes on."""
        while True:
            done, status, used = os.wait4(self.pid, os.WNOHANG)
            if done:
                self.cpu_s = used.ru_utime + used.ru_stime
                code = os.waitstatus_to_exitcode(status)
                return "slow" if code == -signal.SIGXCPU else "survived" if code == 0 else "killed"
            if time.monotonic() > self.until:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return "slow"
            if not wait:
                return None
            time.sleep(0.02)


def begin(path: str, tree: ast.Module | None, tests: Sequence[str], cpu_s: float, watch: Path | None = None) -> Trial:
    """Run the tests with this tree of the module (None: as it is), in a process of its own group.

    It is ended when it has computed for `cpu_s`, however busy the machine is, or when it has waited for long. `watch`:
    where to write which tests call which functions of the module, for `read_calls`.
    """
    handle, output = tempfile.mkstemp(prefix="mutant-", suffix=".log")
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.setpgid(0, 0)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s), int(cpu_s) + 5))
            code = _run(path, tree, tests, watch)
        except BaseException:  # noqa: BLE001  a process border
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(handle)
    return Trial(pid, Path(output), time.monotonic() + _WAIT_S)


def _run(path: str, tree: ast.Module | None, tests: Sequence[str], watch: Path | None) -> int:
    if tree is not None:
        name = path.removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, _Finder(name, str(ROOT / path), tree))  # type: ignore[arg-type]  # it has what is asked of it
    options = [
        "-x",
        "-q",
        "-p",
        "no:randomly",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        _LOADED,
        "-o",
        "timeout=0",
    ]
    options += ["-k", NOT]
    watcher = None if watch is None else _Watcher()
    with tempfile.TemporaryDirectory(prefix="mutant-") as place:
        options += [f"--basetemp={place}/t", f"--rootdir={ROOT}"]
        code = int(pytest.main([*options, *tests], plugins=[] if watcher is None else [watcher]))
    if watch is not None and watcher is not None:
        watch.write_bytes(json.dumps(watcher.calls).encode())
    return code


class _Watcher:
    """A plugin that notes who calls the functions of our modules, and how long each test takes."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, float]] = {}  # "path:first line" -> test -> seconds
        self._ours = {str(ROOT / path): path for path in MODULES}
        self._met: set[str] = set()

    def _trace(self, frame: FrameType, _event: str, _argument: object) -> None:
        if (path := self._ours.get(frame.f_code.co_filename)) is not None:
            self._met.add(f"{path}:{frame.f_code.co_firstlineno}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._met, began = set(), time.perf_counter()
        threading.settrace(self._trace)
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            took = time.perf_counter() - began
            for place in self._met:
                self.calls.setdefault(place, {})[item.nodeid] = took
            self.calls.setdefault("", {})[item.nodeid] = took


def read_calls(watched: Path) -> dict[str, list[str]]:
    """Of each place, the tests that come there, the quickest first; of the place "", all tests."""
    calls: dict[str, dict[str, float]] = json.loads(watched.read_bytes())
    return {place: sorted(tests, key=lambda each: tests[each]) for place, tests in calls.items()}
