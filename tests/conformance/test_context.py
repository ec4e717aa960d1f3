"""A context that is no capacity of keys and values, as those of Qwen 3: what the SDK asks by default is served."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.conformance.server import Server
from tests.engine.wide_keys import wide_model

CONTEXT = 40_960


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values of Qwen3-0.6B; any token ends a text, so that none computes what it may grow to."""
    return wide_model(tmp_path_factory.mktemp("model") / "qwen", layers=28, context=CONTEXT, ends=268)


@pytest.fixture(scope="module")
def server(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(qwen, tmp_path_factory.mktemp("knapper") / "data") as server:
        yield server


@pytest.fixture
def client(server: Server, qwen: Path) -> Iterator[tinker.SamplingClient]:
    with client_of(server, qwen) as client:
        yield client


@contextmanager
def client_of(server: Server, model: Path) -> Iterator[tinker.SamplingClient]:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        yield service.create_sampling_client(base_model=str(model)).result()


def sampled(client: tinker.SamplingClient, prompt: int, **params: int) -> types.SampledSequence:
    tokens = types.ModelInput.from_ints([1 + n % 50 for n in range(prompt)])
    asked = types.SamplingParams(**params)  # type: ignore[arg-type]  # numbers of several kinds
    (sequence,) = client.sample(tokens, num_samples=1, sampling_params=asked).result(timeout=60).sequences
    return sequence


@pytest.mark.timeout(120)
def test_the_default_parameters_and_as_many_tokens_as_the_context_has_are_served(
    client: tinker.SamplingClient, server: Server
) -> None:
    assert sampled(client, 3).stop_reason == "stop"
    assert len(sampled(client, 3, max_tokens=8).tokens) <= 8
    positions = positions_of(server)
    for max_tokens in (32_768, CONTEXT - 3, CONTEXT - 2):  # no capacity, the whole context, one more: to its end
        if positions >= CONTEXT:
            assert sampled(client, 3, max_tokens=max_tokens).stop_reason == "stop"
        else:  # a machine of some 12 GiB or less has no memory for it, and says so
            with pytest.raises(tinker.RequestFailedError, match=f"key/value memory; allowed: {positions}"):
                sampled(client, 3, max_tokens=max_tokens)
    with pytest.raises(tinker.RequestFailedError, match=f"it has {CONTEXT}; allowed: up to {CONTEXT - 1}"):
        sampled(client, CONTEXT, max_tokens=1)
    assert most_memory(server.processes()["engine"]) < 2**31, "what a text may grow to is reserved, not taken"


@pytest.mark.timeout(120)
def test_where_the_context_does_not_fit_a_text_may_fill_what_there_is(qwen: Path, tmp_path: Path) -> None:
    """Four thousandths of what is left: some hundred positions of 40,960, or some thousand on a large machine."""
    with (
        Server.start(qwen, tmp_path / "data", settings={"KNAPPER_KV_MEMORY": "0.004"}) as server,
        client_of(server, qwen) as client,
    ):
        assert sampled(client, 3).stop_reason == "stop"
        positions = positions_of(server)
        assert 3 < positions < CONTEXT // 2
        assert "not even one text of the whole context fits" in server.log()
        longest = positions // 64 * 64
        assert sampled(client, 3, max_tokens=longest - 2).stop_reason == "stop"
        with pytest.raises(tinker.RequestFailedError, match=f"key/value memory; allowed: {positions}. Lower"):
            sampled(client, 3, max_tokens=longest - 1)
        too_long = f"it has {positions + 1}; allowed: up to {longest}, as the server has key/value memory for {longest}"
        with pytest.raises(tinker.RequestFailedError, match=too_long):
            sampled(client, positions + 1)


def positions_of(server: Server) -> int:
    (found,) = re.findall(r"kv_cache_tokens=(\d+)", server.log())
    return int(found)


def most_memory(pid: int) -> int:
    """That the process ever had, in bytes."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
