"""Merged weights are the base's with the adapter's: the same log-probabilities, through transformers and PEFT."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from knapper.engine import host_memory
from knapper.errors import UserError
from knapper.export import adapter, merge
from tests.engine.strange import strange_model
from tests.engine.tiny import tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(3))
MODELS: dict[str, Callable[[Path], Path]] = {
    "tied": lambda at: tiny_model(at, kind="llama"),
    "untied": lambda at: tiny_model(at, kind="llama_untied"),
    "q and k with norms": lambda at: tiny_model(at, kind="qwen3"),
    "computed by transformers": lambda at: strange_model(at, "vaultgemma"),
}


def loaded(directory: Path, **more: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **more)
    return model.eval()


def trained(base: Path, directory: Path, std: float = 0.2, **config: Any) -> torch.Tensor:
    """Write a PEFT directory of random matrices that matter. Returns what PEFT makes of base and adapter."""
    torch.manual_seed(7)
    model: Any = get_peft_model(loaded(base), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(directory, save_embedding_layers=False)
    return logprobs(PeftModel.from_pretrained(loaded(base), directory))


def logprobs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=TOKENS).logits.float(), -1)


def merged(base: Path, directory: Path, out: Path) -> list[str]:
    said: list[str] = []
    merge.merge(merge.plan(base, adapter.read(directory)), out, said.append)
    return said


def sharded(base: Path, directory: Path) -> Path:
    """The same model in three files with an index."""
    shutil.copytree(base, directory)
    tensors = load_file(base / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for shard in range(3):
        name = f"model-{shard + 1:05}-of-00003.safetensors"
        own = {key: tensors[key] for key in sorted(tensors)[shard::3]}
        save_file(own, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("tied", {"target_modules": ALL}),
        ("untied", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ("q and k with norms", {
            "target_modules": ALL, "rank_pattern": {"layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 2},
        }),
        ("computed by transformers", {"target_modules": ALL}),
    ],
    ids=["all", "some, rslora", "patterns", "computed by transformers"],
)  # fmt: skip
def test_a_merged_model_is_base_and_adapter(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    base = MODELS[kind](tmp_path / "base")
    wanted = trained(base, tmp_path / "adapter", **config)
    assert float((wanted - logprobs(loaded(base))).abs().max()) > 0.1, "nothing was adapted"
    merged(base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logprobs(loaded(tmp_path / "out")), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("kind", ["tied", "untied", "computed by transformers"])
def test_a_trained_head_is_untied_from_the_embedding(kind: str, tmp_path: Path) -> None:
    base = MODELS[kind](tmp_path / "base")
    wanted = trained(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    merged(base, tmp_path / "adapter", tmp_path / "out")
    out = loaded(tmp_path / "out")
    assert out.get_output_embeddings().weight is not out.get_input_embeddings().weight
    torch.testing.assert_close(out.get_input_embeddings().weight, loaded(base).get_input_embeddings().weight)
    torch.testing.assert_close(logprobs(out), wanted, atol=1e-4, rtol=1e-4)


def test_shards_in_small_blocks_are_the_same_and_an_interrupted_merge_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = sharded(tiny_model(tmp_path / "base"), tmp_path / "shards")
    wanted = trained(base, tmp_path / "adapter", target_modules=[*ALL])
    monkeypatch.setattr(merge, "_BLOCK_BYTES", 5 * 64 * 4)  # five rows, which divides none of its sizes
    merged(base, tmp_path / "adapter", tmp_path / "out")
    out = tmp_path / "out"
    torch.testing.assert_close(logprobs(loaded(out)), wanted, atol=1e-4, rtol=1e-4)

    whole = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    (out / "config.json").unlink()  # as a kill leaves it: the first file whole, another begun
    second, third = sorted(whole)[1:]
    (out / second).rename(out / f".{second}.part")
    (out / third).unlink()
    (tmp_path / "victim").write_text("precious")
    (out / f".{third}.part").symlink_to(tmp_path / "victim")  # in a folder that others may write to
    kept = (out / sorted(whole)[0]).stat().st_mtime_ns
    assert [line.endswith("was there") for line in merged(base, tmp_path / "adapter", out)] == [True, False, False]
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors") if path.name[0] != "."} == whole
    assert (out / sorted(whole)[0]).stat().st_mtime_ns == kept
    assert (tmp_path / "victim").read_text() == "precious"
    assert merged(base, tmp_path / "adapter", out) == [f"{out} is complete already"]


def test_a_bfloat16_base_is_rounded_once(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    trained(base, tmp_path / "adapter", target_modules=ALL)
    found = adapter.read(tmp_path / "adapter")
    merged(base, tmp_path / "adapter", tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(weights)
    adapted = 0
    for module, pair in found.pairs.items():
        a_RI, b_OR = found.matrices(pair)
        name = f"{module}.weight"
        exact = weights[name].double() + b_OR.double() @ a_RI.double()
        torch.testing.assert_close(written[name], exact.to(torch.bfloat16), atol=1e-6, rtol=2**-7)
        adapted += int(not torch.equal(written[name], weights[name]))
    assert adapted == len(found.pairs)


def test_a_directory_of_something_else_is_not_written_into(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    for name, modules in (("one", ["q_proj"]), ("two", ["v_proj"])):
        trained(base, tmp_path / name, target_modules=modules)
    merged(base, tmp_path / "one", tmp_path / "out")
    with pytest.raises(UserError, match="holds the export of another checkpoint or base model; remove it"):
        merged(base, tmp_path / "two", tmp_path / "out")
    with pytest.raises(UserError, match="is not empty, and no export of this"):
        merged(base, tmp_path / "one", base)


def test_a_disk_or_memory_that_will_not_do_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(tmp_path / "base")
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
        with pytest.raises(UserError, match=r"the merged model takes .* MiB, and the disk of .* has 1000 bytes left"):
            merged(base, tmp_path / "adapter", tmp_path / "out")
    with monkeypatch.context() as small:
        small.setattr(host_memory, "available", lambda: 1000)
        with pytest.raises(UserError, match=r"merging takes .* of memory, and 1000 bytes are left"):
            merged(base, tmp_path / "adapter", tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*.safetensors")]
    merged(base, tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    trained(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    found = adapter.read(tmp_path / "adapter")

    save_file({name.replace("layers.1.", "layers.7."): tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=r"has no weight for model.layers.7.self_attn.q_proj"):
        merge.plan(base, adapter.read(tmp_path / "adapter"))
    wide = {name: torch.zeros(len(tensor), 65) if "_A" in name else tensor for name, tensor in tensors.items()}
    save_file(wide, file)
    with pytest.raises(UserError, match=r"q_proj.weight is \[64, 64\], and the adapter makes .* \[64, 65\]"):
        merge.plan(base, adapter.read(tmp_path / "adapter"))
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match="would have numbers that float32 cannot hold"):
        merged(base, tmp_path / "adapter", tmp_path / "out")
    quantized = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(quantized, base / "model.safetensors")
    with pytest.raises(
        UserError, match=r"is float8_e4m3fn; allowed: bfloat16, .*Merge into the unquantized base model"
    ):
        merge.plan(base, found)
