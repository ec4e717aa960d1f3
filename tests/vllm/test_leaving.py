"""A core leaves nothing behind: when it rests, and however its server ends. `make test-vllm` runs this."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.conformance.server import Server, running, wait_until
from tests.engine.sampling.test_scheduler import prompt_of, request
from tests.engine.tiny import tiny_model
from tests.vllm.house import House, bundle

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny", kind="llama_wide")


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    """A sampler of vLLM that keeps its adapters in a directory of this test's."""
    memory = tmp_path / "shelf"
    memory.mkdir()
    settings = {"KNAPPER_SAMPLER": "vllm", "KNAPPER_VLLM_ADAPTER_DIRECTORY": str(memory)}
    with Server.start(model, tmp_path / "data", settings=settings) as started:
        yield started
        started.stop()
        assert list(memory.iterdir()) == [], "adapters stay in memory"


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=lambda stop: stop.name)
def test_a_server_that_is_stopped_leaves_no_process_and_no_adapter(
    stop: signal.Signals, server: Server, model: Path, tmp_path: Path
) -> None:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        sampler = client.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints(prompt_of(9).tolist())
        sampler.sample(prompt, 1, types.SamplingParams(max_tokens=4)).result()
        members = server.members("engine")
        assert len(members) > 1, "the core is a process of its own"
        assert list((tmp_path / "shelf").glob("*/*/adapter_model.safetensors")), "the adapter lies in the test's shelf"
    assert server.stop(stop) == 0
    assert [pid for pid in members if running(pid)] == []


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_core_that_only_starts_ends_with_its_server(end: str, server: Server, model: Path) -> None:
    service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
    sampler = service.create_sampling_client(base_model=str(model)).result()
    with closing(sampler.holder):  # `with service` would tell the server that the session ends, until it answers
        sampler.sample(types.ModelInput.from_ints(prompt_of(9).tolist()), 1, types.SamplingParams(max_tokens=4))
        wait_until(lambda: "engine" in server.processes(), "the engine's process is there")
        wait_until(lambda: len(server.members("engine")) > 2, "it has begun to start a core", 120)
        members = server.members("engine")
        if end == "stop":
            server.stop()
        else:
            server.kill()
            wait_until(lambda: not any(map(running, members)), "the core has ended", 60)
    assert [pid for pid in members if running(pid)] == []


def test_a_server_that_is_killed_takes_its_core_with_it(server: Server, model: Path) -> None:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        prompt = types.ModelInput.from_ints(prompt_of(9).tolist())
        sampler = service.create_sampling_client(base_model=str(model)).result()
        before = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=4, seed=5)).result()
        members = server.members("engine")
        server.kill("engine")
        wait_until(lambda: not any(map(running, members)), "the core has ended")
        after = sampler.sample(prompt, 1, types.SamplingParams(max_tokens=4, seed=5)).result()
        assert after.sequences[0].tokens == before.sequences[0].tokens
        members = server.members("engine")
    server.kill()
    wait_until(lambda: not any(map(running, members)), "the core has ended with the supervisor")


def test_a_core_that_rests_has_no_process_and_the_next_sample_wakes_another(model: Path, tmp_path: Path) -> None:
    """On a CPU; on a GPU it sleeps instead, which was not run."""
    house = House(model, tmp_path, rest_s=0.5)
    house.save("some")
    sample_request = request(adapter=bundle("some"), prompt=prompt_of(12), seed=3, max_tokens=8)
    try:
        [before] = house.run(sample_request)
        core = house.engine.core
        assert core is not None
        pids = core.pids
        assert pids
        assert all(map(running, pids))
        house.within(asyncio.to_thread(wait_until, lambda: not any(map(running, pids)), "the core has ended"))
        assert house.engine.released
        [after] = house.run(sample_request)
        assert house.engine.starts == 2
        assert after.sequences[0].tokens.tolist() == before.sequences[0].tokens.tolist()
    finally:
        house.close()
