"""A base model over several processes, through the real gateway and SDK: two and four ranks on gloo.

Bits are compared where the number of ranks is above one: there they depend on none of it. One process multiplies by
packed matrices, which add in another order, so it is compared within rounding.
"""

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tinker
from tinker import types

from tests.conformance import data
from tests.conformance.data import CE
from tests.conformance.server import Server, running, wait_until

pytestmark = pytest.mark.timeout(900)

ADAM = types.AdamParams(learning_rate=1e-2)
LENGTHS = (450, 400, 430, 380, 410)  # three micro-batches: more than any process computes alone


def ranks(devices: int, **settings: str) -> dict[str, str]:
    return {"KNAPPER_DEVICES": str(devices), "KNAPPER_DEVICE": "cpu", **settings}


def passed(client: tinker.TrainingClient, n: int) -> "tinker.APIFuture[types.ForwardBackwardOutput]":
    return client.forward_backward(data.batch(np.random.default_rng(n), LENGTHS), CE)


def step(client: tinker.TrainingClient, n: int) -> list[bytes]:
    forward = passed(client, n)
    client.optim_step(ADAM).result()
    return data.bits(forward.result())


def new_run(service: tinker.ServiceClient, model: Path, rank: int = 4) -> tinker.TrainingClient:
    return service.create_lora_training_client(str(model), rank=rank, seed=1).result()


def others(server: Server) -> list[int]:
    """Pids of the ranks beside the engine, in their order."""
    wait_until(lambda: "engine" in server.processes(), "the engine lives", timeout_s=60)
    engine = server.processes()["engine"]
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"knapper.engine.ranks.worker" in command:
            at = command.index(b"knapper.engine.ranks.worker")
            if command[at + 1] == str(engine).encode():
                found[int(command[at + 3])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def sampled(client: tinker.TrainingClient) -> tuple[list[int], list[float]]:
    """A greedy text of the weights so far, and its log-probabilities."""
    sampler = client.save_weights_and_get_sampling_client().result()
    params = types.SamplingParams(max_tokens=6, temperature=0.0, seed=1, stop=[])
    (sequence,) = sampler.sample(types.ModelInput.from_ints([1, 2, 3]), 1, params).result().sequences
    return list(sequence.tokens), list(sequence.logprobs or [])


def kill(server: Server, rank: int) -> int:
    """kill -9 it; the others end with it. Of rank 0, that is the engine."""
    pids = others(server)
    if rank == 0:
        server.kill("engine")
    else:
        os.kill(pids[rank - 1], signal.SIGKILL)
    wait_until(lambda: not any(map(running, pids)), "no rank outlives another")
    return rank


def kill_ranks(tmp_path: Path, model: Path, devices: int, kills: int, seed: int = 1) -> None:
    """SIGKILL of each rank in turn, somewhere in a step, against the same steps undisturbed."""
    rng, steps = np.random.default_rng(seed), 2 * kills
    with (
        Server.start(model, tmp_path / "data", settings=ranks(devices)) as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
    ):
        calm = new_run(service, model)
        undisturbed = [*(step(calm, n) for n in range(steps)), sampled(calm)]
        wild, killed, seen = new_run(service, model), [], []
        for n in range(steps):
            forward = passed(wild, n)
            if n % 2:
                time.sleep(rng.random() * 0.1)  # anywhere in the step
                killed.append(kill(server, (n // 2 + 1) % devices))
            wild.optim_step(ADAM).result()
            seen.append(data.bits(forward.result()))
        assert [*seen, sampled(wild)] == undisturbed, f"killed {killed}, seed {seed}"
        for rank in set(killed) - {0}:
            assert f"rank {rank} was ended by SIGKILL" in server.log(), "and rank 0 says which one was lost"
        before = others(server)
    wait_until(lambda: not any(map(running, before)), "the ranks end with the server")


def test_a_rank_that_is_killed_changes_no_bit(tmp_path: Path, model: Path) -> None:
    kill_ranks(tmp_path, model, devices=2, kills=2)


@pytest.mark.long
def test_each_of_four_ranks_is_killed_in_turn(tmp_path: Path, model: Path) -> None:
    kill_ranks(tmp_path, model, devices=4, kills=8)


def test_a_rank_that_hangs_is_found_by_the_deadline(tmp_path: Path, model: Path) -> None:
    with (
        Server.start(model, tmp_path / "data", settings=ranks(2, KNAPPER_RANK_TIMEOUT_S="4")) as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
    ):
        calm, hung = new_run(service, model), new_run(service, model)
        undisturbed = [step(calm, n) for n in range(2)]
        seen = [step(hung, 0)]
        (other,) = others(server)
        os.kill(other, signal.SIGSTOP)
        assert [*seen, step(hung, 1)] == undisturbed
        assert "kept the others waiting for more than 4 s" in server.log()
        wait_until(lambda: not running(other), "what hung was ended")


def test_a_run_grows_and_shrinks_over_resumes_and_loses_nothing(tmp_path: Path, model: Path) -> None:
    """From one process to two, to four, and back to one; with gradients that wait for their step each time."""
    settings = ranks(1)
    with (
        Server.start(model, tmp_path / "data", settings=settings) as server,
        tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service,
    ):
        calm, moved = new_run(service, model), new_run(service, model)

        def half_step(client: tinker.TrainingClient, n: int) -> np.ndarray:
            """The end of the step before, and the gradients of this one."""
            if n:
                client.optim_step(ADAM).result()
            return data.all_logprobs(passed(client, n).result())

        undisturbed = [half_step(calm, n) for n in range(4)]
        seen = []
        for n, devices in enumerate((1, 2, 4, 1)):
            if n:
                server.stop(signal.SIGTERM)
                settings["KNAPPER_DEVICES"] = str(devices)
                server.up()
            seen.append(half_step(moved, n))
        for n, (now, before) in enumerate(zip(seen, undisturbed, strict=True)):
            np.testing.assert_allclose(now, before, rtol=1e-4, atol=1e-4, err_msg=f"step {n}")
        assert not np.allclose(undisturbed[0], undisturbed[1], atol=1e-2), "or every state would do"
