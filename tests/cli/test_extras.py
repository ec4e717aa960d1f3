"""What an extra would have brought is asked for in one line, by any command that needs it."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from knapper.cli import extras

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
USERS = sorted(set(PROJECT["optional-dependencies"]) - {"dev", "vllm"})  # vLLM has an environment of its own


def required() -> Iterator[tuple[str, str]]:
    for extra in USERS:
        for line in PROJECT["optional-dependencies"][extra]:
            yield extra, re.match(r"[A-Za-z0-9._-]+", line)[0]  # type: ignore[index]  # a name begins each


@pytest.mark.parametrize(("extra", "distribution"), [*required()], ids=lambda each: str(each))
def test_every_module_of_an_extra_leads_to_it(extra: str, distribution: str) -> None:
    named = re.compile(re.escape(distribution).replace(r"\-", "[-_.]"), re.IGNORECASE)
    brought = {module for module, owners in packages_distributions().items() if any(map(named.fullmatch, owners))}
    if distribution.startswith("google-cloud-"):
        brought = {"google.cloud", "google.cloud.pubsub_v1"}
    assert brought, "make setup installs every extra"
    found = [extras.brought_by(module) for module in brought]
    assert {each[1] for each in found if each} == {extra}


def without(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`knapper ARGUMENTS` in a Python that has no such module."""
    code = f"import sys; sys.modules[{module!r}] = None; sys.argv[1:] = {list(arguments)!r}\n"
    code += "from knapper.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("kubernetes", ("doctor",), "deploy"),
        ("kubernetes", ("deploy", "list"), "deploy"),
        ("kubernetes", ("deploy", "status", "a/b"), "deploy"),
        ("kubernetes", ("chaos", "--namespace", "knapper", "--yes-kill-processes"), "deploy"),
        ("matplotlib", ("demo",), "demo"),
        ("tinker", ("demo", "--events"), "demo"),
        ("jsonpatch", ("deploy", "add", "a/b", "--dry-run", "--config", "CONFIG"), "deploy"),
    ],
)
def test_a_command_without_its_extra_says_in_one_line_how_to_get_it(
    module: str, arguments: tuple[str, ...], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = without(module, *(str(tmp_path / "config.json") if each == "CONFIG" else each for each in arguments))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"knapper: {module} is not installed; it comes with: pip install 'knapper[{extra}]'\n"


def test_a_missing_module_that_no_extra_brings_keeps_its_traceback() -> None:
    done = without("typer.main", "version")
    assert "Traceback" in done.stderr
