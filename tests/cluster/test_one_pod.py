"""One pod that trains and samples (knative/components/one-pod), its container's own command line as a process.

There is no GPU: vLLM is not asked, and the engine's own sampler samples, as it does on a card for mixtures and hybrids.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker
import yaml
from tinker import types

from knapper.cluster.kustomize import render
from tests.cluster.containers import MODEL, overlay, running
from tests.cluster.test_containers import Trial, ended, upload_job
from tests.engine.tiny import tiny_model
from tests.jobs.works import CHAT
from tests.manifests.rendering import stacked
from tests.store.emulator import running as emulator_running

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]


def local_one_pod(at: Path) -> Path:
    """A kustomization: the local overlay with the component, and the image that has both functions."""
    path = stacked(at, "overlays/local", "components/one-pod") / "kustomization.yaml"
    both = {"name": "dev.local/knapper/train-step", "newName": "dev.local/knapper/sample-vllm"}
    path.write_text(path.read_text() + yaml.safe_dump({"images": [both]}))
    return at


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    root = tmp_path_factory.mktemp("cluster")
    model = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    (model / "chat_template.jinja").write_text(CHAT)
    objects = overlay(model, render(local_one_pod(tmp_path_factory.mktemp("overlay"))))
    with emulator_running(root / "emulator.log") as emulator:
        httpx.post(f"{emulator.url}/storage/v1/b", json={"name": "knapper"}, trust_env=False).raise_for_status()
        with running(objects, model, emulator.url, root) as (containers, ports):
            gateway = containers["gateway"]
            command = ["python", "-m", "knapper", "key", "create", "demo"]
            made = subprocess.run(
                command, env=gateway.environment, cwd=gateway.directory, capture_output=True, text=True
            )
            assert made.returncode == 0, made.stderr
            url, broker = f"http://127.0.0.1:{ports['gateway']}", f"http://127.0.0.1:{ports['broker']}"
            yield Trial(containers, url, broker, emulator.url, made.stdout.strip(), [])
    for container in containers.values():
        assert "Traceback" not in container.said(), f"{container.name}:\n{container.said()[-4000:]}"


def test_it_trains_and_samples_through_the_sdk(trial: Trial) -> None:
    assert sorted(each.partition("-")[0] for each in trial.containers) == ["broker", "gateway", "reward", "train"]
    tokens = [1, 2, 3, 4, 5, 6]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64"),
            "weights": types.TensorData(data=[1.0] * 5, dtype="float32"),
        },
    )
    with tinker.ServiceClient(base_url=trial.url, api_key=trial.key) as service:
        training = service.create_lora_training_client(MODEL, rank=8, seed=0).result()
        losses = []
        for _ in range(3):
            passed = training.forward_backward([datum], "cross_entropy")
            training.optim_step(types.AdamParams(learning_rate=0.01)).result()
            losses.append(passed.result().metrics["loss:sum"])
        assert losses == sorted(losses, reverse=True)
        sampler = training.save_weights_and_get_sampling_client().result()
        greedy = types.SamplingParams(max_tokens=3, temperature=0.0)
        prompt = types.ModelInput.from_ints(tokens[:3])
        first, again = (sampler.sample(prompt, num_samples=1, sampling_params=greedy).result() for _ in range(2))
        assert first.sequences[0].tokens == again.sequences[0].tokens


def test_a_jobs_events_reach_both_functions_of_it(trial: Trial) -> None:
    upload_job(trial, "one")
    state = ended(trial, "one")
    assert state["state"] == "completed", state
