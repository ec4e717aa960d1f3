"""`knapper up` with its store in a bucket: what the SDK's core does there, and that the bits are a directory's."""

import asyncio
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import tinker
from tinker import types

from knapper.settings import Settings
from knapper.store.factory import open_store
from tests.conformance.kill_client import datum, digest_of, tokens
from tests.conformance.server import Server, wait_until
from tests.store import proxy
from tests.store.emulator import Emulator
from tests.store.proxy import FAULTS


@pytest.fixture
def address(gcs: Emulator, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs.url)
    return f"gs://{gcs.make_bucket()}/deployments/one"


@pytest.fixture
def over_bucket(address: str, model: Path, tmp_path: Path) -> Iterator[Server]:
    with Server.start(model, tmp_path / "data", settings={"KNAPPER_STORE": address}) as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


def train_sample_save_resume(url: str, model: Path) -> tuple[str, list[object]]:
    """The path of the last checkpoint, and all that was answered."""
    answers: list[object] = []
    prompt, params = types.ModelInput.from_ints(tokens(3)), types.SamplingParams(max_tokens=6, seed=4, stop=[])

    def train(training: tinker.TrainingClient, steps: range) -> None:
        for step in steps:
            passed = training.forward_backward([datum(step), datum(step + 50)], "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=1e-2)).result()
            answers.append(passed.result().metrics["loss:sum"])

    with tinker.ServiceClient(base_url=url, api_key="tml-local") as service:
        first = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        train(first, range(4))
        sampler = first.save_weights_and_get_sampling_client().result()
        sampled = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
        answers += [(each.tokens, each.logprobs) for each in sampled.sequences]
        saved = first.save_state("half").result().path
        resumed = service.create_training_client_from_state_with_optimizer(saved).result()
        train(resumed, range(4, 6))
        train(first, range(4, 6))
        assert answers[-2:] == answers[-4:-2], "a resumed run goes on as the one that was saved"
        return resumed.save_state("end").result().path, answers


def test_training_sampling_saving_and_resuming_give_the_same_bits_over_a_bucket_as_over_a_directory(
    server: Server, over_bucket: Server, address: str, model: Path
) -> None:
    path, answers = train_sample_save_resume(server.url, model)
    there, same = train_sample_save_resume(over_bucket.url, model)
    assert same == answers
    assert asyncio.run(digest_of(address, there)) == asyncio.run(digest_of(str(server.data), path))
    assert asyncio.run(open_store(Settings.load({"KNAPPER_STORE": address})).list("runs/"))
    assert not (over_bucket.data / "store").exists(), "nothing of the state is on this machine"


def test_a_bucket_that_does_not_exist_stops_the_start_and_says_so(address: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the bucket does not exist; create it, or correct KNAPPER_STORE"):
        Server.start(model, tmp_path / "data", settings={"KNAPPER_STORE": "gs://nobody-made-this"})


@pytest.mark.timeout(180)
def test_a_bucket_in_trouble_makes_clients_wait_with_a_reason_and_changes_no_answer(
    server: Server, gcs: Emulator, address: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """One request in eight meets a fault; then, for a while, nothing may be written at all."""
    path, answers = train_sample_save_resume(server.url, model)
    draw = random.Random(11)
    with proxy.before(gcs.url) as way, caplog.at_level(logging.WARNING):
        settings = {"KNAPPER_STORE": address, "STORAGE_EMULATOR_HOST": way.url}
        with Server.start(model, tmp_path / "data", settings=settings) as running:
            way.choose = lambda _method, _path: draw.choice(FAULTS) if draw.random() < 0.12 else ""
            there, same = train_sample_save_resume(running.url, model)
            assert same == answers
            assert sum(way.met.values()) > 20, "hardly a fault happened"

            way.choose = lambda _method, _path: ""
            with tinker.ServiceClient(base_url=running.url, api_key="tml-local") as service:
                training = service.create_lora_training_client(str(model), rank=4, seed=1).result()
                way.choose = lambda method, _path: "" if method == "GET" else "403"
                waiting = training.forward([datum(0)], "cross_entropy")
                wait_until(lambda: "permission denied" in caplog.text, "the user is told", timeout_s=60)
                way.choose = lambda _method, _path: ""
                assert waiting.result().metrics["loss:sum"] > 0
    assert asyncio.run(digest_of(address, there)) == asyncio.run(digest_of(str(server.data), path))
