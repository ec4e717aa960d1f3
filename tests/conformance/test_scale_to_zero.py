"""Idle is free: without work the engine's processes end, and the next operation brings them back to the same bits."""

import asyncio
import re
from pathlib import Path

import httpx
import pytest
import tinker
from tinker import types

from knapper.state.journal.records import decode
from knapper.state.usage import Samplings
from knapper.store.directory import DirectoryStore
from tests.conformance.kill_client import datum, tokens
from tests.conformance.server import Server, wait_until
from tests.engine.tiny import tiny_model

FUNCTIONS = {"engine", "train_step", "sample"}


@pytest.mark.parametrize(
    "flags", [(), pytest.param(("--isolated",), marks=pytest.mark.long)], ids=["shared", "isolated"]
)
@pytest.mark.timeout(180)
def test_functions_end_when_idle_and_come_back_on_the_next_bell(
    tmp_path: Path, flags: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tmp_path / "a" / "model" / "tiny")
    with Server.start(model, tmp_path / "data", "--idle", "2", *flags) as server:
        assert not FUNCTIONS & set(server.processes()), "nothing computes before there is work"
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
        training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        said = [each.getMessage() for each in caplog.records if "starting from zero" in each.getMessage()]
        notice = r"Deprecation notice: train_step is starting from zero: \d+ s so far \(no estimate yet\)"
        assert re.fullmatch(notice, said[0])
        sampler = training.save_weights_and_get_sampling_client().result()
        prompt = types.ModelInput.from_ints(tokens(1))
        params = types.SamplingParams(max_tokens=8, seed=3, stop=[])

        def sampled() -> list[int]:
            return list(sampler.sample(prompt, num_samples=1, sampling_params=params).result().sequences[0].tokens)

        first = sampled()
        before = training.forward_backward([datum(1)], "cross_entropy").result().metrics["loss:sum"]
        wait_until(lambda: not FUNCTIONS & set(server.processes()), "the functions have ended", timeout_s=60)
        assert "scaled to zero" in server.log()

        after = training.forward([datum(1)], "cross_entropy").result().metrics["loss:sum"]
        assert after == before
        again = [each.getMessage() for each in caplog.records if "starting from zero" in each.getMessage()][-1]
        stages = ", ".join(rf"{stage} [\d.]+ s" for stage in ("pod", "import", "weights", "claim"))
        assert re.search(rf"\d+ s so far \(usually \d+ s: {stages}\)", again), "each stage of the one before, timed"
        assert sampled() == first
        service.close("success").result()
        told = httpx.get(f"{server.url}/metrics", trust_env=False).text
        starts = dict(re.findall(r'knapper_cold_start_seconds_sum\{stage="(total|pod)"\} ([\d.e-]+)', told))
        assert 0 < float(starts["pod"]) < float(starts["total"]), "what came before the process is a part of the wait"
    assert asyncio.run(metered(tmp_path / "data" / "store")) > 0, (
        "the gateway that stopped wrote down what samples took"
    )


async def metered(directory: Path) -> float:
    """Seconds of the device, of all samples."""
    store = DirectoryStore(directory)
    records = [(name, await store.get(name)) for name in await store.list("usage/")]
    rows = [row for name, data in records if data for row in decode(data, Samplings, name).rows]
    assert sum(row.sampled for row in rows) == 16
    return sum(row.device_s for row in rows)
