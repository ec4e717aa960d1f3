"""The SDK's command line against a real server: a checkpoint's life, and a download that PEFT reads."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.conformance import data
from tests.conformance.reference import Standard
from tests.conformance.server import Dtype, Server

Tinker = Callable[..., Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]


@pytest.fixture
def environment(server: Server, tmp_path: Path) -> dict[str, str]:
    return {
        "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0", "HOME": str(tmp_path)
    }  # fmt: skip


@pytest.fixture
def cli(environment: dict[str, str]) -> Iterator[Tinker]:
    """`tinker --format json` with these arguments: what it printed, or how it failed if it should."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.conformance.commands"], env=os.environ | environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as commands:  # fmt: skip
        assert commands.stdin is not None
        assert commands.stdout is not None
        asked, answers = commands.stdin, commands.stdout

        def call(*arguments: str, fails: bool = False) -> Any:
            print(json.dumps(arguments), file=asked, flush=True)
            answer = json.loads(answers.readline())
            assert (answer["error"] is not None) == fails, answer
            if fails:
                return answer["error"]
            return json.loads(answer["printed"]) if answer["printed"].strip() else None

        yield call
        asked.close()


def test_a_checkpoints_life_on_the_command_line(cli: Tinker, client: tinker.TrainingClient, model: Path) -> None:
    run = client.get_info().model_id
    path = client.save_state("first").result().path
    other = client.save_weights_for_sampler("second").result().path

    assert [found["model_name"] for found in cli("model", "list")["models"]] == [str(model)]
    assert run in [found["training_run_id"] for found in cli("run", "list")["runs"]]
    assert cli("run", "info", run)["lora_rank"] == 4
    assert [found["tinker_path"] for found in cli("checkpoint", "list", "--limit", "2")["checkpoints"]] == [other, path]
    listed = cli("checkpoint", "list", "--run-id", run)["checkpoints"]
    assert {found["tinker_path"]: found["checkpoint_type"] for found in listed} == {path: "training", other: "sampler"}

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = cli("checkpoint", "info", path)
        return found

    assert (shown()["public"], shown().get("expires_at")) == (False, None)
    cli("checkpoint", "publish", path)
    cli("checkpoint", "set-ttl", path, "--ttl", "7200")
    assert shown()["public"]
    assert shown()["expires_at"] is not None
    cli("checkpoint", "unpublish", path)
    cli("checkpoint", "set-ttl", path, "--remove")
    assert (shown()["public"], shown().get("expires_at")) == (False, None)
    assert "3600" in cli("checkpoint", "set-ttl", path, "--ttl", "60", fails=True)

    assert cli("checkpoint", "delete", "--yes", path) == {"deleted_count": 1, "failed": []}
    assert [found["tinker_path"] for found in cli("checkpoint", "list", "--run-id", run)["checkpoints"]] == [other]
    assert "not found" in cli("checkpoint", "info", path, fails=True).lower()


@pytest.mark.parametrize("kind", ["weights", "external_weights"])
def test_a_downloaded_folder_loads_in_peft_and_gives_the_servers_logprobs(
    cli: Tinker, environment: dict[str, str], client: tinker.TrainingClient, model: Path, dtype: Dtype, tmp_path: Path,
    kind: str,
) -> None:  # fmt: skip
    rng = np.random.default_rng(5)
    batch = data.batch(rng)
    for _ in range(3):
        client.forward_backward(batch, "cross_entropy")
        client.optim_step(types.AdamParams(learning_rate=1e-2))
    served = data.all_logprobs(client.forward(batch, "cross_entropy").result())
    save = client.save_state if kind == "weights" else client.save_weights_external
    path = save("final").result().path

    command = [sys.executable, "-m", "tinker.cli", "--format", "json", "checkpoint", "download", path]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / json.loads(done.stdout)["destination"]
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    left = [found["tinker_path"] for found in cli("checkpoint", "list", "--limit", "3")["checkpoints"]]
    assert left[0] == path, "the export that the download made is gone"

    Standard(model, folder, dtype).expect(served, lambda reference: reference.all_logprobs(batch))
    with pytest.raises(AssertionError, match="distance"):
        Standard(model, None, dtype).expect(served, lambda reference: reference.all_logprobs(batch))
