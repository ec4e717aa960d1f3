"""The oldest SDK that is served, 0.18.2, in a process of its own: it speaks JSON where the newest speaks protobuf."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tinker
from tinker import types

from tests.conformance.oldest_client import datum
from tests.conformance.server import Server

VERSION = "0.18.2"
SDK = Path(sys.prefix) / f"tinker-{VERSION}"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def oldest(server: Server, model: Path) -> dict[str, Any]:
    """What a loop of the oldest SDK got."""
    if not SDK.is_dir():
        pytest.skip(f"{SDK} is not there; `make setup` installs it")
    environment = {**os.environ, "PYTHONPATH": f"{SDK}{os.pathsep}{ROOT}", "TINKER_TELEMETRY": "0"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.conformance.oldest_client", server.url, str(model)],
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(ran.stdout)
    assert found["version"] == VERSION
    return found | {"terminal": ran.stderr}


def test_its_user_is_told_once_that_it_is_old(oldest: dict[str, Any]) -> None:
    assert oldest["terminal"].count(f"tinker {VERSION} sends data as JSON") == 1


def test_it_trains_as_the_newest_does(oldest: dict[str, Any], service: tinker.ServiceClient, model: Path) -> None:
    """Bit for bit, though one sends lists of decimal numbers and the other bytes."""
    client = service.create_lora_training_client(str(model), rank=4, seed=1).result()
    batch = [datum(n) for n in range(4)]
    losses, logprobs = [], []
    for _ in range(3):
        passed = client.forward_backward(batch, "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        losses.append(passed.metrics["loss:sum"])
        logprobs = passed.loss_fn_outputs[0]["logprobs"].tolist()
    assert oldest["losses"] == losses
    assert oldest["logprobs"] == logprobs
    assert losses[-1] < losses[0]
    assert oldest["scored"] == client.forward(batch, "cross_entropy").result().metrics["loss:sum"]
    path = client.save_weights_for_sampler("newest").result().path
    sampler = service.create_sampling_client(model_path=path).result()
    params = types.SamplingParams(max_tokens=6, seed=5, stop=[])
    prompt = types.ModelInput.from_ints(list(range(9)))
    sampled = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    assert oldest["tokens"] == [sequence.tokens for sequence in sampled.sequences]
    assert oldest["sampled_logprobs"] == [sequence.logprobs for sequence in sampled.sequences]
    assert oldest["prompt_logprobs"] == sampler.compute_logprobs(prompt).result()


def test_it_saves_and_loads(oldest: dict[str, Any], service: tinker.ServiceClient) -> None:
    assert oldest["reloaded"] == oldest["scored"]
    client = service.create_training_client_from_state(oldest["state"]).result()
    scored = client.forward([datum(n) for n in range(4)], "cross_entropy").result()
    assert scored.metrics["loss:sum"] == oldest["scored"]


def test_it_manages_its_checkpoints(oldest: dict[str, Any]) -> None:
    assert oldest["resumed"] == [oldest["scored"]] * 2
    assert oldest["listed"] == {oldest["state"]: False, oldest["sampler_path"]: True}
    assert oldest["left"] == [oldest["state"]]
    assert oldest["found"]
    assert "not served as archives" in oldest["archive"]


def test_it_hears_what_was_wrong(oldest: dict[str, Any]) -> None:
    assert "model_input[0] is 1000000; allowed: 0 to" in oldest["refusal"]
