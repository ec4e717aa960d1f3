"""The command line answers at once: what is heavy is imported by what needs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import knapper
from knapper.settings import Settings
from tests import command

HEAVY = {
    "asyncio", "functions_framework", "google.protobuf", "httpx", "huggingface_hub", "msgspec", "numpy", "pydantic",
    "rich", "safetensors", "starlette", "structlog", "tokenizers", "torch", "transformers", "uvicorn", "zstandard",
}  # fmt: skip


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    "code",
    [
        "import knapper",
        "import knapper.cli.main",
        "import knapper.cli.main as c\ntry: c.app(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    modules = _run(f"{code}\nimport sys; print('MODULES', *sys.modules)").rpartition("MODULES ")[2].split()
    assert "knapper" in modules
    assert HEAVY.isdisjoint(modules), HEAVY.intersection(modules)


def test_settings_are_read_without_anything_heavy() -> None:
    modules = _run("import knapper.settings, sys; print(*sys.modules)").split()
    assert HEAVY.intersection(modules) == {"msgspec"}


def _knapper(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return command.knapper(*arguments, environment={**os.environ, **environment})


def test_version_and_settings_are_printed() -> None:
    assert _knapper("version").stdout == f"{knapper.__version__}\n"
    printed = _knapper("settings", KNAPPER_PORT="9000").stdout
    assert "KNAPPER_PORT=9000  (environment)" in printed
    assert "KNAPPER_HOST=127.0.0.1  (default)" in printed


def test_the_version_is_an_option_too() -> None:
    assert _knapper("--version").stdout == f"{knapper.__version__}\n"


def test_settings_are_told_as_json() -> None:
    told = {line["variable"]: line for line in json.loads(_knapper("settings", "--json", KNAPPER_PORT="9000").stdout)}
    assert (told["KNAPPER_PORT"]["value"], told["KNAPPER_PORT"]["source"]) == ("9000", "environment")
    assert len(told) == len(Settings.__struct_fields__)


@pytest.mark.parametrize(
    ("listing", "empty"),
    [
        (["key", "list"], "there are no keys; `knapper key create TENANT` makes one\n"),
        (["dead-letters"], "there are no dead letters: every event was delivered\n"),
    ],
)
def test_empty_listings_say_so(listing: list[str], empty: str, tmp_path: Path) -> None:
    assert _knapper(*listing, "--data", str(tmp_path)).stdout == empty
    assert json.loads(_knapper(*listing, "--data", str(tmp_path), "--json").stdout) == []


def test_keys_are_told_as_json(tmp_path: Path) -> None:
    data = ["--data", str(tmp_path)]
    secret = _knapper("key", "create", "ada", "--note", "für", *data).stdout.strip()
    printed = _knapper("key", "list", "--json", *data).stdout
    assert printed.isascii()
    assert secret not in printed
    (key,) = json.loads(printed)
    assert (key["tenant"], key["note"], key["revoked_at"]) == ("ada", "für", None)
    assert _knapper("key", "revoke", key["id"], *data).returncode == 0
    (revoked,) = json.loads(_knapper("key", "list", "--json", *data).stdout)
    assert revoked["revoked_at"] >= revoked["created_at"] == key["created_at"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands(shell: str) -> None:
    """As the script that `--install-completion` installs asks for it; which shell runs here does not matter."""
    asked = {
        "_KNAPPER_COMPLETE": f"complete_{shell}", "COMP_WORDS": "knapper job", "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "knapper job", "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }  # fmt: skip
    code = "import knapper.cli.main as c; c.app(prog_name='knapper')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked})
    assert "jobs" in done.stdout, done.stderr
    assert "deploy" not in done.stdout


@pytest.mark.parametrize(("typed", "meant"), [(["setings"], "settings"), (["jobs", "lst"], "list")])
def test_a_misspelt_command_is_told_which_was_meant(typed: list[str], meant: str) -> None:
    done = _knapper(*typed)
    assert done.returncode == 2
    assert f"Did you mean '{meant}'?" in done.stderr


def test_a_wrong_setting_is_one_line_and_not_a_traceback() -> None:
    done = _knapper("settings", KNAPPER_DTYPE="float16")
    assert done.returncode == 1
    assert done.stderr == "knapper: KNAPPER_DTYPE is 'float16'; allowed: auto, float32, bfloat16\n"


@pytest.mark.parametrize("option", [["--port", "65536"], ["--dtype", "int4"], ["--nonsense"]])
def test_a_wrong_option_is_refused_before_anything_starts(option: list[str]) -> None:
    done = _knapper("up", *option)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
