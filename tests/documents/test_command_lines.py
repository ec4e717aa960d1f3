"""The words of every command on a page are known: subcommands, options, make targets, files, modules, variables.

Commands of blocks and of prose alike, also where no test can run them.
"""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main

from knapper.cli.main import app
from tests.documents.pages import PAGES, ROOT, name_of

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
_NOT_A_WORD = ("...", "|", "or", "and")


def _spans(path: Path) -> Iterator[str]:
    """Lines of shell blocks, with what a backslash continues, and code spans of prose."""
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```(?:sh)?\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


SPANS = {name_of(path): [" ".join(span.split()) for span in _spans(path)] for path in PAGES}


def _commands(page: str, program: str) -> Iterator[list[str]]:
    """Arguments of each call of the program."""
    for span in SPANS[page]:
        for found in re.finditer(rf"(?:^|[;&|(] ?|bin/|-m |[A-Z_]+=\S+ |\$ ){program} ([^;&|)#]*)", span):
            try:
                yield shlex.split(found[1])
            except ValueError:  # a quote that the rest of the line closes
                yield found[1].split()


def _expect_known(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)  # of the click that typer brings along
    options = {"--help", "--version", "--install-completion", "--show-completion"}
    for argument in arguments:
        options |= {option for each in command.params for option in (*each.opts, *each.secondary_opts)}
        word = argument.strip(",.:")
        if word.startswith("--"):
            assert word.partition("=")[0] in options, f"{command.name} has no {word}"
        elif hasattr(command, "commands"):
            if word in _NOT_A_WORD or not word:
                return
            found = command.commands.get(word)
            assert found is not None, f"{command.name} has no command {word}"
            command = found


@pytest.mark.parametrize("page", SPANS)
def test_every_knapper_command_and_its_options_exist(page: str) -> None:
    for arguments in _commands(page, "knapper"):
        _expect_known(arguments)


def test_the_parser_is_read_right() -> None:
    """The check itself can fail: at a subcommand, at an option, and at an option of another command."""
    _expect_known(["jobs", "show", "NAME", "--follow"])
    for wrong in (["jobs", "watch"], ["up", "--modle", "x"], ["key", "create", "--follow"]):
        with pytest.raises(AssertionError, match="has no"):
            _expect_known(wrong)


@pytest.mark.parametrize("page", SPANS)
def test_every_make_target_exists(page: str) -> None:
    for arguments in _commands(page, "make"):
        if arguments and re.fullmatch("[a-z-]+", arguments[0]):
            assert arguments[0] in TARGETS, f"{page}: make {arguments[0]}"


@pytest.mark.parametrize("page", SPANS)
def test_every_module_and_script_that_python_runs_exists(page: str) -> None:
    for arguments in [each for program in ("python", "python3.11") for each in _commands(page, program)]:
        if "-m" in arguments:
            (module,) = arguments[arguments.index("-m") + 1 :][:1]
            if not module.startswith("tinker_cookbook"):  # it has an environment of its own: test_cookbook.py runs it
                assert importlib.util.find_spec(module), f"{page}: python -m {module}"
        for argument in arguments:
            if re.fullmatch(r"(examples|benchmarks|tests)/\S+\.py", argument):
                assert (ROOT / argument).is_file(), f"{page}: {argument}"


@pytest.mark.parametrize("page", SPANS)
def test_every_file_of_the_repository_that_a_command_names_exists(page: str) -> None:
    """What kubectl, terraform, docker and pytest are given, and what lies in examples/."""
    for span in SPANS[page]:
        for path in re.findall(r"(?<![\w./-])(?:examples|knative|terraform|tests)/[\w./-]*\w", span):
            if "/.rendered" in path or path.endswith(".auto.tfvars.json"):  # written by terraform
                continue
            assert (ROOT / path).exists(), f"{page}: {path}"


def _variables(stage: str) -> set[str]:
    texts = [path.read_text() for path in (ROOT / "terraform" / "stages" / stage).glob("*.tf")]
    return set(re.findall(r'^variable "(\w+)"', "\n".join(texts), flags=re.MULTILINE))


def test_every_variable_that_terraform_is_given_is_one_of_its_stages() -> None:
    stages = {path.name: _variables(path.name) for path in (ROOT / "terraform" / "stages").iterdir()}
    assert all(stages.values())
    known = set[str]().union(*stages.values())
    for page in SPANS:
        for arguments in _commands(page, "terraform"):
            given = [b.partition("=")[0] for a, b in pairwise(arguments) if a == "-var"]
            assert set(given) <= known, f"{page}: {set(given) - known}"


def test_every_image_that_is_built_is_a_stage_of_the_dockerfile() -> None:
    stages = set(re.findall(r"^FROM .* AS ([\w-]+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    named = {target for spans in SPANS.values() for span in spans for target in re.findall(r"--target ([\w-]+)", span)}
    assert named
    assert named <= stages
