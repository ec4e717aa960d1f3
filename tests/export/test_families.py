"""Of every family that is served: merged weights are the base's with the adapter's, and an adapter comes back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from knapper.engine import checkpoint_format
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.loader import load
from knapper.engine.models.mlp import Mixture
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import UserError
from knapper.export import adapter, imported, merge
from knapper.ids import LOCAL_TENANT
from tests.engine.composites import CASES, composite_model
from tests.engine.packed import bitsandbytes_model, fp8_model, int4_model, mxfp4_model
from tests.engine.runs import datum, done, request, spec
from tests.engine.strange import FOREIGN, NATIVE, strange_model
from tests.engine.test_peft_parity import plain_logprobs

LENGTH = 40  # beyond the windows, which are of 16 tokens
EXPERTS_IN_ONE = ("nemotron_h_latent", "qwen3_5_moe")  # of which files may have experts one by one, or joined


def trained(base: Path, out: Path, *, head: bool) -> tuple[Trainer, RunState]:
    """A run with an adapter of random matrices that matter, and its export in `out`."""
    trainer = Trainer(load(base, torch.float32))
    state = trainer.create(spec(train_unembed=head))
    state.weights_P.normal_(std=0.1, generator=torch.Generator().manual_seed(3))
    out.mkdir()
    for name, content in checkpoint_format.export(state, with_optimizer=False).items():
        (out / name).write_bytes(bytes(content))
    return trainer, state


def merged(base: Path, directory: Path, out: Path) -> Path:
    merge.merge(merge.plan(base, adapter.read(directory)), out, print)
    return out


def expect_merged(base: Path, at: Path, *, head: bool, auto: Any = AutoModelForCausalLM) -> None:
    trainer, state = trained(base, at / "adapter", head=head)
    merged(base, at / "adapter", at / "out")
    example = datum(LENGTH, "cross_entropy", np.random.default_rng(1))
    wanted = done(trainer.forward_backward(state, request([example], forward_only=True)))[1].outputs[0]["logprobs"]
    plain, found = (_logprobs(directory, auto, example) for directory in (base, at / "out"))
    np.testing.assert_allclose(found, wanted, atol=5e-5, rtol=1e-5)
    assert np.abs(found - plain).max() > 0.03, "nothing was adapted"


def _logprobs(directory: Path, auto: Any, example: Any) -> Any:
    model = auto.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return plain_logprobs(model, example).numpy()


@pytest.mark.parametrize("kind", [*NATIVE, *FOREIGN])
def test_a_merged_model_is_base_and_adapter_in_transformers(kind: str, tmp_path: Path) -> None:
    expect_merged(strange_model(tmp_path / "base", kind), tmp_path, head=kind not in FOREIGN)


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_a_merged_model_of_images_and_text_is_base_and_adapter_in_transformers(
    kind: str, layout: str, tmp_path: Path
) -> None:
    base = composite_model(tmp_path / "base", kind, layout)
    expect_merged(base, tmp_path, head=False, auto=AutoModelForImageTextToText)


@pytest.mark.parametrize("kind", NATIVE)
def test_an_adapter_that_was_exported_is_imported_as_it_was(kind: str, tmp_path: Path) -> None:
    base = strange_model(tmp_path / "base", kind)
    _, state = trained(base, tmp_path / "adapter", head=True)
    found = imported.read(tmp_path / "adapter", ModelConfig.read(base), state.spec.base_model, LOCAL_TENANT)
    assert {name: bytes(content) for name, content in found.files.items()} == {
        path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()
    }


@pytest.mark.parametrize("kind", EXPERTS_IN_ONE)
def test_experts_of_one_tensor_are_merged_as_those_one_by_one(kind: str, tmp_path: Path) -> None:
    base = strange_model(tmp_path / "base", kind)
    trained(base, tmp_path / "adapter", head=False)
    wanted = _joined(merged(base, tmp_path / "adapter", tmp_path / "out"))
    save_file(_joined(base), base / "model.safetensors", {"format": "pt"})
    found = load_file(merged(base, tmp_path / "adapter", tmp_path / "joined") / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=1e-5)
    load(tmp_path / "joined", torch.float32)


def _joined(directory: Path) -> dict[str, Tensor]:
    """A model's tensors, with the experts of a layer in one, wherever the files have them one by one."""
    config, tensors = ModelConfig.read(directory), load_file(directory / "model.safetensors")
    for index, layer in enumerate(config.layers):
        if not isinstance(layer.mlp, Mixture):
            continue
        of_tensor: dict[str, list[list[Tensor]]] = {}
        for linear in layer.mlp.linears(config.hidden):
            names = [f"model.layers.{index}.{module}.weight" for module in linear.modules]
            stored = [name if name in tensors else name.replace("model.", "backbone.", 1) for name in names]
            if linear.joined is not None and stored[0] in tensors:
                of_tensor.setdefault(linear.joined, []).append([tensors.pop(name) for name in stored])
        for name, linears in of_tensor.items():
            tensors[f"model.layers.{index}.{name}"] = torch.stack(
                [torch.cat(own) for own in zip(*linears, strict=True)]
            )
    assert any(tensor.dim() == 3 and ".experts." in name for name, tensor in tensors.items())
    return tensors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_parameters": ["mixer.experts.up_proj", "mixer.experts.gate_proj"]}, "of which one is down_proj"),
        ({"target_parameters": [7]}, r"target_parameters is \[7\]; expected names"),
        ({"rank_pattern": {"mixer.experts.up_proj": 5}}, "makes it 5 for each expert"),
        ({"target_parameters": ["mixer.experts.down_proj"]}, "of rank 32 and B of rank 32; .* makes it 4"),
    ],
)
def test_pairs_of_all_experts_that_cannot_be_told_apart_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = strange_model(tmp_path / "base", "nemotron_h")
    trained(base, tmp_path / "adapter", head=False)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(UserError, match=said):
        merge.plan(base, adapter.read(tmp_path / "adapter"))


@pytest.mark.parametrize("make", [mxfp4_model, fp8_model, bitsandbytes_model, int4_model])
def test_a_packed_base_is_refused_with_what_to_merge_into(make: Callable[[Path], Path], tmp_path: Path) -> None:
    base = make(tmp_path / "base")
    trained(base, tmp_path / "adapter", head=False)
    with pytest.raises(UserError, match="unquantized"):
        merge.plan(base, adapter.read(tmp_path / "adapter"))
