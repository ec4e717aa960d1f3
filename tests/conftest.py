"""For every test: one compute thread (bits depend on the number), no model hub, no telemetry, replayable inputs."""

import os

# Before anything imports torch, the hub's client or the SDK: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TINKER_TELEMETRY", "0")

from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import settings

from tests import instructions

# No deadline: shared machines are slow at random. `print_blob`: a failure prints the decorator that replays it.
settings.register_profile("knapper", deadline=None, print_blob=True)
settings.load_profile("knapper")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sampler", choices=["torch", "vllm"], default="torch", help="who samples, in tests of sampling")


_run = instructions.Seen()


def pytest_collection_finish() -> None:
    instructions.watch()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What this process tried: told to xdist, if it is one of its workers."""
    seen = instructions.seen().sent()
    _run.add(seen)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["instructions"] = seen


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """One of xdist's workers has ended."""
    if (seen := getattr(node, "workeroutput", {}).get("instructions")) is not None:
        _run.add(seen)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """The last lines: see tests/instructions.py."""
    yield
    terminalreporter.write_sep("=", "instruction sets")
    for line in instructions.lines(_run, os.environ):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def sampler_name(request: pytest.FixtureRequest) -> str:
    """`vllm` only where vLLM is installed: `make test-vllm` asks for it."""
    return str(request.config.getoption("--sampler"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Modules with what may take longer than usual come first, in any order: no worker is left alone at the end.

    Whole modules: what is torn from the others of its module starts a server of its own.
    """
    patient = {item.path for item in items if any(mark.args[0] > 120 for mark in item.iter_markers("timeout"))}
    items.sort(key=lambda item: item.path not in patient)
    if config.getoption("--sampler") == "vllm":
        for item in items:  # whichever samples first waits until a core has started
            item.add_marker(pytest.mark.timeout(300), append=False)
