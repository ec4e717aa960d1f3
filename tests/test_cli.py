"""The command line answers at once: what is heavy is imported by what needs it."""

import os
import subprocess
import sys

import pytest

import knapper

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
        "import knapper.cli",
        "import knapper.cli as c\ntry: c.app(['--help'])\nexcept SystemExit: pass",
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
    command = [sys.executable, "-m", "knapper.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_version_and_settings_are_printed() -> None:
    assert _knapper("version").stdout == f"{knapper.__version__}\n"
    printed = _knapper("settings", KNAPPER_PORT="9000").stdout
    assert "KNAPPER_PORT=9000  (environment)" in printed
    assert "KNAPPER_HOST=127.0.0.1  (default)" in printed


def test_a_wrong_setting_is_one_line_and_not_a_traceback() -> None:
    done = _knapper("settings", KNAPPER_DTYPE="float16")
    assert done.returncode == 1
    assert done.stderr == "knapper: KNAPPER_DTYPE is 'float16'; allowed: auto, float32, bfloat16\n"


@pytest.mark.parametrize("option", [["--port", "65536"], ["--dtype", "int4"], ["--nonsense"]])
def test_a_wrong_option_is_refused_before_anything_starts(option: list[str]) -> None:
    done = _knapper("up", *option)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
