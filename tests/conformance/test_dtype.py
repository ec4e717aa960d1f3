"""A run keeps the dtype that it was made in: under an engine of another one it waits, and its user is told for what."""

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from tests import instructions
from tests.conformance import data
from tests.conformance.data import CE
from tests.conformance.server import Server, wait_until

OTHER = "was made in float32, and this engine computes in bfloat16"


def step(client: tinker.TrainingClient, n: int) -> list[bytes]:
    """One step of a run; the bits of its log-probabilities before it."""
    passed = client.forward_backward(data.batch(np.random.default_rng(n)), CE)
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    return data.bits(passed.result())


def test_a_run_waits_for_an_engine_of_its_own_dtype_and_goes_on_bit_for_bit(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        Server.start(model, tmp_path / "data", dtype="float32") as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
        caplog.at_level(logging.WARNING),
    ):
        calm, moved = (service.create_lora_training_client(str(model), rank=4, seed=1).result() for _ in range(2))
        undisturbed = [step(calm, n) for n in range(4)]
        assert [step(moved, n) for n in range(2)] == undisturbed[:2]
        state = moved.save_state("two").result().path
        sampler = moved.save_weights_for_sampler("two").result().path

        server.kill()
        server.dtype = "bfloat16"
        server.up()
        waiting = moved.forward_backward(data.batch(np.random.default_rng(2)), CE)
        stepping = moved.optim_step(types.AdamParams(learning_rate=1e-2))
        wait_until(lambda: OTHER in caplog.text, "the user is told", timeout_s=20)
        told = next(line for line in caplog.text.splitlines() if OTHER in line)
        for part in (moved.model_id, "KNAPPER_DTYPE=float32", "--dtype float32", "checkpoints in a new run"):
            assert part in told
        # Others go on meanwhile: new runs, from its checkpoints too, and whoever samples its weights.
        fresh = service.create_training_client_from_state(state).result()
        assert step(fresh, 2) != undisturbed[2], "in bfloat16"
        sampling = service.create_sampling_client(model_path=sampler).result()
        params = types.SamplingParams(max_tokens=4, seed=1, stop=[])
        assert sampling.sample(types.ModelInput.from_ints([1, 2, 3]), 1, params).result().sequences

        server.kill()
        server.dtype = "float32"
        server.up()
        assert data.bits(waiting.result()) == undisturbed[2]
        stepping.result()
        assert step(moved, 3) == undisturbed[3]
        probe = data.batch(np.random.default_rng(9))
        assert data.bits(moved.forward(probe, CE).result()) == data.bits(calm.forward(probe, CE).result())
        assert "Traceback" not in server.log()


def test_auto_says_in_the_log_which_dtype_it_took_and_why(tmp_path: Path, model: Path) -> None:
    with (
        Server.start(model, tmp_path / "data", dtype="auto") as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
    ):
        service.create_lora_training_client(str(model), rank=2).result()
        measured = re.search(r"KNAPPER_DTYPE is auto: measured.*dtype='(\w+)'", server.log())
        loaded = instructions.LOADED.search(server.log())
        assert measured is not None, server.log()
        assert loaded is not None, server.log()
        assert measured[1] == loaded["dtype"]
        assert re.search(r"bfloat16 products are \d+\.\d\d times as fast as float32's", server.log())
