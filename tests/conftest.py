"""For every test: one compute thread (bits depend on the number), no model hub, no telemetry, replayable inputs."""

import os

# Before anything imports torch, the hub's client or the SDK: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TINKER_TELEMETRY", "0")

import pytest
from hypothesis import settings

# No deadline: shared machines are slow at random. `print_blob`: a failure prints the decorator that replays it.
settings.register_profile("knapper", deadline=None, print_blob=True)
settings.load_profile("knapper")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sampler", choices=["torch", "vllm"], default="torch", help="who samples, in tests of sampling")


@pytest.fixture(scope="session")
def sampler_name(request: pytest.FixtureRequest) -> str:
    """`vllm` only where vLLM is installed: `make test-vllm` asks for it."""
    return str(request.config.getoption("--sampler"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What may take longer than usual comes first, in any order: no worker is left alone with such a one at the end."""
    items.sort(key=lambda item: not any(mark.args[0] > 120 for mark in item.iter_markers("timeout")))
    if config.getoption("--sampler") == "vllm":
        for item in items:  # whichever samples first waits until a core has started
            item.add_marker(pytest.mark.timeout(300), append=False)
