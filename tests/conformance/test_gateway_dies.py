"""The gateway is killed while polls wait on it: the next one answers every one of them, and no client notices."""

import os
import signal
import time
from pathlib import Path

import pytest
import tinker
from tinker import types

from tests.conformance.kill_client import datum, tokens
from tests.conformance.server import Server, wait_until


@pytest.fixture
def isolated(model: Path, tmp_path: Path) -> Server:
    return Server(model, tmp_path / "data", "--isolated")


class Calm:
    """Nothing happens."""

    def freeze(self) -> None: ...

    def kill(self) -> None: ...


class Disaster(Calm):
    """Both engines are stopped, so that nothing is answered; then the gateway dies, twice, and maybe an engine."""

    def __init__(self, server: Server, also: str) -> None:
        self._server, self._also = server, also
        self._stopped: dict[str, int] = {}

    def freeze(self) -> None:
        processes = self._server.processes()
        self._stopped = {role: processes[role] for role in ("train_step", "sample")}
        for pid in self._stopped.values():
            os.kill(pid, signal.SIGSTOP)

    def kill(self) -> None:
        time.sleep(1.5)  # every request is accepted, and polled for
        first = self._server.kill("gateway")
        wait_until(lambda: self._server.processes().get("gateway") not in (None, first), "another gateway")
        if self._also:
            self._server.kill(self._also)
            del self._stopped[self._also]
        time.sleep(1.5)  # the polls are at the new one
        self._server.kill("gateway")
        for pid in self._stopped.values():
            os.kill(pid, signal.SIGCONT)


def outstanding(url: str, model: Path, world: Calm) -> list[object]:
    """Passes, a step, a save and samples, all asked for before anything is waited for; then their answers."""
    with tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=5, seed=2, stop=[])
        prompt = types.ModelInput.from_ints(tokens(1))
        sampler.sample(prompt, num_samples=1, sampling_params=params).result()
        world.freeze()
        passes = [training.forward_backward([datum(n)], "cross_entropy") for n in range(4)]
        stepped = training.optim_step(types.AdamParams(learning_rate=1e-2))
        last = training.forward([datum(9)], "cross_entropy")
        saved = training.save_state("end")
        samples = [sampler.sample(prompt, num_samples=2, sampling_params=params) for _ in range(3)]
        world.kill()
        answers: list[object] = [each.result().metrics["loss:sum"] for each in (*passes, last)]
        stepped.result()
        answers.append(saved.result().path.rpartition("/")[2])
        return answers + [[(one.tokens, one.logprobs) for one in each.result().sequences] for each in samples]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("also", [pytest.param("", marks=pytest.mark.long), "train_step"])
def test_polls_that_wait_on_a_gateway_that_dies_are_answered_by_the_next(
    server: Server, isolated: Server, model: Path, also: str
) -> None:
    calm = outstanding(server.url, model, Calm())
    isolated.up()
    try:
        assert outstanding(isolated.url, model, Disaster(isolated, also)) == calm
    finally:
        isolated.stop()
    assert "Traceback" not in isolated.log()
