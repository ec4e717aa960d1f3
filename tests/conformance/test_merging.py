"""What a run with the SDK's defaults leaves merges: in PEFT, saved and read by transformers, and in the cookbook.

The cookbook's own `weights.download` fetches it, unmodified, in a process of its own.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tinker import types
from transformers import AutoModelForCausalLM

from tests import command
from tests.conformance import data
from tests.conformance.conftest import exported
from tests.conformance.cookbook.workplace import COOKBOOK, installed
from tests.conformance.server import Server
from tests.engine.strange import strange_model
from tests.engine.tiny import tiny_model

pytestmark = pytest.mark.timeout(300)

KINDS: dict[str, Callable[[Path], Path]] = {
    "tied": lambda at: tiny_model(at, kind="llama"),
    "untied": lambda at: tiny_model(at, kind="llama_untied"),
    "tied, computed by transformers": lambda at: strange_model(at, "vaultgemma"),
}
ADAM = types.AdamParams(learning_rate=1e-2)
BATCH = data.batch(np.random.default_rng(21))


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return KINDS[request.param](tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server.start(model, tmp_path_factory.mktemp("knapper") / "data") as running:
        yield running
    assert "Traceback" not in running.log(), running.log()[-4000:]


def trained(service: tinker.ServiceClient, model: Path, **train: bool) -> tinker.TrainingClient:
    client = service.create_lora_training_client(str(model), rank=8, seed=5, **train).result()  # type: ignore[arg-type]  # flags
    for _ in range(5):
        client.forward_backward(BATCH, "cross_entropy")
        client.optim_step(ADAM).result()
    return client


def served(client: tinker.TrainingClient) -> torch.Tensor:
    """The log-probabilities of BATCH, as the server computes them."""
    return torch.from_numpy(data.all_logprobs(client.forward(BATCH, "cross_entropy").result()))


def loaded(directory: Path, **changes: bool) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", **changes
    )
    return model.eval()


def in_peft(base: Any, directory: Path) -> Any:
    return PeftModel.from_pretrained(base, directory / "adapter")


def logprobs(model: torch.nn.Module) -> torch.Tensor:
    found = []
    for datum in BATCH:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([datum.model_input.to_ints()])).logits[0].float()
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()
        found.append(torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0])
    return torch.cat(found)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


class Cookbook:
    """A process with the cookbook, nothing of ours on its path, and a fork of it for each program: its imports take
    seconds, and it keeps the client of its first server.
    """

    def __init__(self, log: Path) -> None:
        environment = {
            **os.environ, "PYTHONPATH": str(COOKBOOK), "TINKER_API_KEY": "tml-local", "TINKER_TELEMETRY": "0",
            "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self._log = log
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=said, text=True,
            )  # fmt: skip

    def __call__(self, server: Server, *lines: str) -> None:
        """Run these lines of Python."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"url": server.url, "program": "\n".join(lines)}) + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n", self._log.read_text(encoding="utf-8")[-4000:]

    def close(self) -> None:
        self._process.communicate()


_PROGRAM = """
import json, os, sys
from tinker_cookbook import weights
for line in sys.stdin:
    asked = json.loads(line)
    if not (pid := os.fork()):
        os.dup2(2, 1)
        os.environ["TINKER_BASE_URL"] = asked["url"]
        exec(asked["program"])
        os._exit(0)
    print("done" if os.waitpid(pid, 0)[1] == 0 else "failed", flush=True)
"""


@pytest.fixture(scope="session")
def cookbook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cookbook]:
    assert installed(), f"the cookbook is not in {COOKBOOK}; `make setup` installs it"
    cookbook = Cookbook(tmp_path_factory.mktemp("cookbook") / "log")
    yield cookbook
    cookbook.close()


def download(path: str, directory: Path) -> str:
    return f"weights.download(tinker_path={path!r}, output_dir={str(directory)!r})"


def test_a_default_run_merges_into_the_model_that_is_served(
    server: Server, model: Path, cookbook: Cookbook, tmp_path: Path
) -> None:
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = trained(service, model)
        wanted = served(client)
        path = client.save_state("final").result().path
        adapter, built = str(tmp_path / "adapter"), str(tmp_path / "built")
        build = f"weights.build_hf_model(base_model={str(model)!r}, adapter_path={adapter!r}, output_path={built!r})"
        cookbook(server, download(path, tmp_path / "adapter"), build)
    assert float((wanted - logprobs(loaded(model))).abs().max()) > 0.5, "nothing was learned"
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata()["merges"] == "yes"

    adapted = in_peft(loaded(model), tmp_path)
    close(logprobs(adapted), wanted)
    merged = adapted.merge_and_unload()
    close(logprobs(merged), wanted)
    merged.save_pretrained(tmp_path / "merged")
    close(logprobs(loaded(tmp_path / "merged")), wanted)
    close(logprobs(loaded(tmp_path / "built")), wanted)


def test_an_adapter_of_a_tied_head_says_that_it_does_not_merge_and_how_it_would(
    server: Server, model: Path, tmp_path: Path
) -> None:
    """Asked for alone, the unembedding is adapted on a tied model too. What the export says to do is right."""
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = trained(service, model, train_attn=False, train_mlp=False)
        wanted = served(client)
        exported(server, client.save_state("head").result().path, tmp_path / "adapter")
    base = loaded(model)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as opened:
        said = opened.metadata()["merges"]
        assert {name.split(".lora_")[0] for name in set(opened.keys())} == {"base_model.model.lm_head"}
    if not tied:
        assert said == "yes"
        return
    assert said.startswith("no: ")
    assert "tie_word_embeddings=False" in said
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings")
        close(logprobs(in_peft(loaded(model), tmp_path)), wanted)
        wrong = in_peft(base, tmp_path).merge_and_unload()
        assert float((logprobs(wrong) - wanted).abs().max()) > 0.1, "it would have merged after all"
    untied = loaded(model, tie_word_embeddings=False)
    untied.lm_head.weight.data = untied.get_input_embeddings().weight.data.clone()
    close(logprobs(in_peft(untied, tmp_path).merge_and_unload()), wanted)


@pytest.mark.parametrize("head", [False, True], ids=["linears", "the head"])
def test_an_export_is_the_model_that_is_served(server: Server, model: Path, head: bool, tmp_path: Path) -> None:
    """`knapper export`, of a training state, over REST; a head that is the embedding gets a matrix of its own."""
    only_head = {"train_attn": False, "train_mlp": False} if head else {}
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = trained(service, model, **only_head)
        wanted = served(client)
        path = client.save_state("final").result().path
    environment = {**os.environ, "TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
    for said in ("merged 1 of 1: model.safetensors\n", f"{tmp_path}/out/merged is complete already\n"):
        done = command.knapper("export", path, "--merged", "--out", str(tmp_path / "out"), environment=environment)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    close(logprobs(loaded(tmp_path / "out" / "merged")), wanted)
    missing = command.knapper("export", f"{path}s", "--merged", "--out", str(tmp_path / "no"), environment=environment)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "does not exist" in missing.stderr
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_an_imported_adapter_trains_and_samples(server: Server, model: Path, tmp_path: Path) -> None:
    """One of PEFT's, of some modules, imported beside the running server; what it does not adapt stays as it is."""
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(loaded(model), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path / "theirs")
    done = command.knapper("import", str(tmp_path / "theirs"), "--data", str(server.data))
    assert done.returncode == 0, done.stderr
    state, weights = done.stdout.split()
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = service.create_training_client_from_state(state).result()
        close(served(client), logprobs(theirs))
        sampler = service.create_sampling_client(weights).result()
        ids = BATCH[0].model_input.to_ints()
        found = sampler.compute_logprobs(types.ModelInput.from_ints(ids)).result()[1:]
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([ids])).logits[0].float()
        wanted = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        close(torch.tensor(found), wanted)
        losses = []
        for _ in range(3):
            losses.append(client.forward_backward(BATCH, "cross_entropy").result().metrics["loss:sum"])
            client.optim_step(ADAM).result()
        assert losses[-1] < losses[0]
        exported(server, client.save_state("trained").result().path, tmp_path / "trained")
    tensors = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    moved = {name.split(".lora_")[0].rpartition(".")[2] for name, tensor in tensors.items() if tensor.any()}
    assert moved == {"q_proj"}


@pytest.mark.parametrize("model", ["tied"], indirect=True)
def test_the_cookbook_downloads_every_checkpoint_that_it_takes(
    server: Server, model: Path, cookbook: Cookbook, tmp_path: Path
) -> None:
    """A training checkpoint through an encrypted export of its own, which is gone afterwards; an export as it is."""
    with tinker.ServiceClient(base_url=server.url, api_key="tml-local") as service:
        client = service.create_lora_training_client(str(model), rank=2, seed=6).result()
        state = client.save_state("state").result().path
        external = client.save_weights_external("external").result().path
        cookbook(server, download(state, tmp_path / "state"), download(external, tmp_path / "external"))
        left = tinker.RestClient(base_url=server.url, api_key="tml-local").list_user_checkpoints(limit=2).result()
    assert [each.tinker_path for each in left.checkpoints] == [external, state], "what the download exported is deleted"
    found = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("state", "external")]
    assert found[0] == found[1]
    assert set(found[0]) == {"adapter_config.json", "adapter_model.safetensors"}
