"""Several clients at once, each as if it were alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from tests.conformance import data
from tests.conformance.conftest import exported
from tests.conformance.server import Server

pytestmark = pytest.mark.timeout(90)
STEPS = 6
Trace = tuple[list[bytes], dict[str, bytes], list[list[int]]]


def train(server: Server, model: Path, name: int, directory: Path, gate: threading.Barrier | None) -> Trace:
    """Everything that a client of its own sees: log-probabilities, files of the last state, sampled tokens.

    With a gate, it takes each step when the other takes it.
    """
    rng = np.random.default_rng(name)
    seen: list[bytes] = []
    texts: list[list[int]] = []
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = service.create_lora_training_client(str(model), rank=2 + 3 * name, seed=name).result()
        for index in range(STEPS):
            if gate is not None:
                gate.wait(60)
            output = client.forward_backward(data.batch(rng, (11 + name, 24)), "cross_entropy")
            client.optim_step(types.AdamParams(learning_rate=1e-2 * (1 + index % 2)))
            if index % 3 == name % 3:
                sampler = client.save_weights_and_get_sampling_client().result()
                params = types.SamplingParams(max_tokens=12, seed=index, stop=[])
                answer = sampler.sample(data.prompt(rng, 9), num_samples=3, sampling_params=params).result()
                texts += [each.tokens for each in answer.sequences]
            seen += data.bits(output.result())
        files = exported(server, client.save_state("end").result().path, directory)
    return seen, {each.name: each.read_bytes() for each in files.iterdir()}, texts


def test_two_clients_interleaved_equal_each_alone_bit_for_bit(server: Server, model: Path, tmp_path: Path) -> None:
    alone = [train(server, model, name, tmp_path / f"alone-{name}", None) for name in (0, 1)]
    gate = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        pair = [threads.submit(train, server, model, name, tmp_path / f"pair-{name}", gate) for name in (0, 1)]
        together = [each.result() for each in pair]
    for one, among in zip(alone, together, strict=True):
        assert one[0] == among[0], "log-probabilities"
        assert (
            one[1].keys()
            == among[1].keys()
            == {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"}
        )
        assert one[1] == among[1], "weights, moments or step count"
        assert one[2] == among[2], "sampled tokens"
    assert alone[0][1] != alone[1][1]
