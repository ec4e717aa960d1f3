"""An adapter of another training is the same function in a run's layout, or it is refused with the reason."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from knapper import limits
from knapper.engine.models.config import ModelConfig
from knapper.engine.training.optimizer import Moments, step
from knapper.errors import UserError
from knapper.export import imported
from knapper.ids import LOCAL_TENANT, Tenant
from knapper.state.checkpoints import Checkpoints
from knapper.state.journal import bundles
from knapper.store.memory import MemoryStore
from knapper.wire.types import AdamW
from tests.engine.tiny import tiny_model
from tests.export.test_merge import ALL, loaded, logprobs, trained

CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": ALL},
    "some of one layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {"target_modules": ALL, "rank_pattern": {"layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 2}},
    "the head": {"target_modules": ["lm_head"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def read(directory: Path, base: Path) -> imported.Imported:
    return imported.read(directory, ModelConfig.read(base), str(base), LOCAL_TENANT)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_read_is_the_same_function(kind: str, base: Path, tmp_path: Path) -> None:
    wanted = trained(base, tmp_path / "adapter", **CONFIGS[kind])
    found = read(tmp_path / "adapter", base)
    (tmp_path / "ours").mkdir()
    for name, content in found.files.items():
        (tmp_path / "ours" / name).write_bytes(bytes(content))
    torch.testing.assert_close(logprobs(PeftModel.from_pretrained(loaded(base), tmp_path / "ours")), wanted)
    assert bool(found.rescaled) == (kind == "patterns")
    theirs, ours = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("adapter", "ours"))
    assert (set(theirs) == set(ours)) == (kind != "some of one layer" and kind != "rslora")
    if kind == "all":
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items()), "bits are kept"


def test_what_is_filled_up_has_no_gradient_and_stays(base: Path, tmp_path: Path) -> None:
    """x A^T B^T with A and B zero: the gradient of each is a product with the other. Adam then moves neither."""
    trained(base, tmp_path / "adapter", **CONFIGS["some of one layer"])
    weights_P = torch.from_numpy(_arena(read(tmp_path / "adapter", base)))
    zeros = weights_P == 0
    assert 0.5 < float(zeros.float().mean()) < 1.0
    grads_P = torch.where(zeros, 0.0, torch.randn(len(weights_P), generator=torch.Generator().manual_seed(1)))
    moments = Moments(torch.zeros_like(weights_P), torch.zeros_like(weights_P), 0)
    for _ in range(3):
        weights_P, moments, _ = step(weights_P, grads_P, moments, AdamW(learning_rate=0.1, weight_decay=0.1))
    assert torch.equal(weights_P == 0, zeros)


def _arena(found: imported.Imported) -> Any:
    import numpy as np

    content = bytes(found.files["adapter_model.safetensors"])
    return np.frombuffer(content, "<f4", offset=8 + int.from_bytes(content[:8], "little")).copy()


def test_an_import_is_stored_once_for_its_tenant_alone(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", **CONFIGS["all"])
    found, at = read(tmp_path / "adapter", base), MemoryStore()

    async def look() -> None:
        paths = await imported.store(found, "mine", at, time.time)
        assert [str(path).rpartition(":train:0/")[2] for path in paths] == ["weights/mine", "sampler_weights/mine"]
        before = await at.list("")
        assert await imported.store(found, "mine", at, time.time) == paths
        assert await at.list("") == before
        checkpoints = Checkpoints(at, time.time)
        for path in paths:
            checkpoint = await checkpoints.resolve(path, LOCAL_TENANT)
            _, files = await bundles.read(at, checkpoint.bundle)
            assert files == {name: bytes(content) for name, content in found.files.items()}
            with pytest.raises(UserError, match="does not exist"):
                await checkpoints.resolve(path, Tenant("other"))

    asyncio.run(look())


def edited(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], directory: Path) -> Path:
    file = directory / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return directory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda old: {name.replace("q_proj", "router"): each for name, each in old.items()},
         r"adapts model.layers.0.self_attn.router, which cannot be trained here; allowed: .*self_attn.q_proj"),
        (lambda old: {name: each[:, :32].contiguous() if "_A" in name else each for name, each in old.items()},
         r"makes model.layers.0.self_attn.q_proj \[64, 32\], and the base model has \[64, 64\]"),
        (lambda old: {name: each * torch.nan for name, each in old.items()}, "NaN or infinite numbers"),
        (lambda old: {name: each for name, each in old.items() if "_A" in name}, "has lora_A alone; expected A and B"),
        (lambda old: {name: each[:2] if "_A" in name else each for name, each in old.items()}, "has A of rank 2"),
        (lambda old: {**old, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, "is no LoRA matrix"),
    ],
    ids=["another linear", "another size", "NaN", "half", "another rank", "a whole weight"],
)  # fmt: skip
def test_tensors_that_cannot_be_continued_are_refused(change: Any, said: str, base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(UserError, match=said):
        read(edited(change, tmp_path / "adapter"), base)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora is true; allowed: false"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"; allowed: true or false'),
        ({"bias": "all"}, 'bias is "all"; allowed: "none"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"peft_type": "LOHA"}, 'peft_type is "LOHA"; allowed: "LORA"'),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern has '\(', no regular expression"),
        ({"alpha_pattern": {r"(\w+)+$x": 4}}, "alpha_pattern has .*none behind a group: others may take for ever"),
        ({"rank_pattern": {".*.*.*.*x": 4}}, r"rank_pattern has .*at most 3 of \* \+"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\]; expected an object"),
        ({"lora_alpha": -1}, "lora_alpha of .* is -1; expected a number above 0"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)  # fmt: skip
def test_options_that_mean_more_than_lora_are_refused(
    options: dict[str, Any], said: str, base: Path, tmp_path: Path
) -> None:
    import json

    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    with pytest.raises(UserError, match=said):
        read(tmp_path / "adapter", base)


def test_a_rank_over_the_limit_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    monkeypatch.setattr(limits, "rank_max", 3)
    with pytest.raises(UserError, match="the adapter has rank 4; allowed: up to 3"):
        read(tmp_path / "adapter", base)
