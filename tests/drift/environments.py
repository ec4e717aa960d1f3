"""Environments beside the developers': each has what pyproject.toml asks for, but a few packages in their newest."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.test_house import ROOT

DIRECTORY: Final = ROOT / ".venv" / "drift"
_EXTRAS: Final = "train,gcp,reward,deploy,traces,demo,log,dev"
_COOKBOOK: Final = ROOT / "tests" / "conformance" / "cookbook" / "requirements.txt"
_VERSIONS: Final = (
    "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
)


@dataclass(frozen=True)
class Environment:
    """`newest`: the packages whose upper bounds are ignored. `tests`: what is run in it, of pytest's arguments.

    `beside`: packages that lie beside the others, in a directory of their own, and are taken without what they need.
    """

    name: str
    newest: tuple[str, ...]
    tests: tuple[str, ...]
    beside: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return DIRECTORY / self.name / "bin" / "python"

    def make(self) -> None:
        """From nothing. Raises CalledProcessError where a package cannot be had."""
        subprocess.run([sys.executable, "-m", "venv", "--clear", DIRECTORY / self.name], check=True)
        torch = "torch" if "torch" in self.newest else f"torch=={_version('torch')}"
        self._install(torch)  # first, as `make setup` does, so that nothing else chooses its build
        self._install("--editable", f"{ROOT}[{_EXTRAS}]")
        self._install("--upgrade", *self.newest)
        prefix = self.python.parents[1]
        self._install("--no-deps", "--target", str(prefix / "tinker-0.18.2"), "tinker==0.18.2")
        if self.beside:
            pinned = _COOKBOOK.read_text(encoding="utf-8").splitlines()
            wanted = [line for line in pinned if line and line[0] != "#" and line.split("==")[0] not in self.beside]
            self._install("--no-deps", "--target", str(prefix / "tinker-cookbook"), *wanted, *self.beside)

    def _install(self, *what: str) -> None:
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        subprocess.run([*pip, *what], check=True)

    def versions(self) -> dict[str, str]:
        return _versions(self.python)

    def test(self, results: Path) -> bool:
        """Whether the tests pass; their names and messages go to `results`, as JUnit has them."""
        command = [
            str(self.python),
            "-m",
            "pytest",
            "-m",
            "not long",
            "-n",
            "2",
            "-q",
            f"--junitxml={results}",
            *self.tests,
        ]
        return subprocess.run(command, cwd=ROOT, env=_surroundings(), check=False).returncode == 0


ENVIRONMENTS: Final = (
    Environment("sdk", ("tinker",), ("tests/conformance", "tests/gateway", "tests/wire"), ("tinker-cookbook",)),
    Environment(
        "libraries",
        ("torch", "transformers", "peft"),
        ("tests/engine", "tests/export", "tests/catalogue", "tests/local"),
    ),
)


def changed(ours: Mapping[str, str], newest: Mapping[str, str]) -> list[str]:
    """`name: ours -> newest`, of packages that both have in other versions."""
    both = sorted(ours.keys() & newest.keys())
    return [f"{name}: {ours[name]} -> {newest[name]}" for name in both if ours[name] != newest[name]]


def of_this_process() -> dict[str, str]:
    return _versions(Path(sys.executable))


def _versions(python: Path) -> dict[str, str]:
    found: dict[str, str] = printed(python, "-c", _VERSIONS)
    return found


def _version(name: str) -> str:
    return of_this_process()[name]


def printed(python: Path, *arguments: str) -> Any:
    """What a program of the checkout prints in its last line, from JSON."""
    command = [str(python), *arguments]
    done = subprocess.run(command, cwd=ROOT, env=_surroundings(), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _surroundings() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
