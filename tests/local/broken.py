"""Model directories that cannot be served, each a whole one in which one thing was changed."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

Change = Callable[[Path], object]


def copied(model: Path, place: Path, change: Change) -> Path:
    """A copy of the model in `place`, changed."""
    shutil.copytree(model, place)
    change(place)
    return place


def config(**changes: Any) -> Change:
    """With other values in config.json; None: without that one."""

    def change(directory: Path) -> None:
        path = directory / "config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))

    return change


def written(name: str, content: str | bytes) -> Change:
    def change(directory: Path) -> None:
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def cut(size: int | None = None) -> Change:
    """The weights, after `size` bytes; None: after half of them."""

    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2 if size is None else size])

    return change


def indexed(index: object) -> Change:
    """As one shard, a.safetensors, with this index."""

    def change(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "a.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def tensors(change_header: Callable[[dict[str, Any]], object]) -> Change:
    """With another header before the same bytes."""

    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change_header(header)
        changed = json.dumps(header).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])

    return change


def _renamed(header: dict[str, Any]) -> None:
    header["model.other.weight"] = header.pop("model.norm.weight")


def _other_dtype(header: dict[str, Any]) -> None:
    for name, one in header.items():
        if name != "__metadata__":
            one["dtype"] = "I32"


# What is changed, and what the one line says of it.
BROKEN: Final[Mapping[str, tuple[Change, str]]] = {
    "weights whose download was cut": (cut(), "was cut: it has 183432 of the 366864 bytes"),
    "a header that was cut": (cut(50), "was cut: it has 50 bytes, and its header alone 2064"),
    "no weights at all": (cut(0), "it has 0 bytes and no header"),
    "weights with more behind them": (
        lambda at: written("model.safetensors", (at / "model.safetensors").read_bytes() + b"x")(at),
        "it has 366865 bytes, and its header promises 366864",
    ),
    "a pointer in place of weights": (
        written("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"),
        "git lfs pull",
    ),
    "a shard that is missing": (
        indexed({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}),
        "shards named by the index are missing: b.safetensors",
    ),
    "a tensor that no shard has": (
        indexed({"weight_map": {"x": "a.safetensors"}}), "tensor x is missing; the index promises it in a.safetensors",
    ),
    "an index that is none": (indexed({"weight_map": {"x": 1}}), "is not a safetensors index"),
    "weights under another name": (
        lambda at: (at / "model.safetensors").rename(at / "w.safetensors"), "has neither model.safetensors nor",
    ),
    "a tensor that is missing": (tensors(_renamed), "tensor model.norm.weight is missing"),
    "a tensor of another shape": (config(intermediate_size=96), r"is [128, 64]; config.json makes it [96, 64]"),
    "layers that are not there": (config(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
    "more layers than any has": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; allowed: at most"),
    "weights that are no floats": (tensors(_other_dtype), "is int32; allowed: bfloat16, float16, float32"),
    "a config that is no JSON": (written("config.json", "{"), "config.json is not JSON"),
    "a config that is a list": (written("config.json", "[]"), "holds list; expected a JSON object"),
    "a config without a context": (config(max_position_embeddings=None), "max_position_embeddings"),
    "a config with ends that are no tokens": (config(eos_token_id="end"), "eos_token_id is 'end'"),
    "a tokenizer that cannot be read": (written("tokenizer.json", "{}"), "tokenizer.json and tokenizer_config.json"),
    "a tokenizer that is missing": (
        lambda at: (at / "tokenizer.json").unlink(), "Missing there: tokenizer.json",
    ),
    "a tokenizer's config that is no JSON": (written("tokenizer_config.json", "{"), "can be read here"),
    "a template that is none": (written("chat_template.jinja", "{% if %}"), "allowed: a Jinja template"),
    "an encoder-decoder": (
        config(model_type="t5", architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True),
        "it is an encoder-decoder",
    ),
    "a model of images": (config(model_type="lfm2_vl", vision_config={}), "it takes more than text"),
    "a model that nobody computes": (config(model_type="deepseek_v4"), "it needs attention over compressed keys"),
    "quantized weights": (config(quantization_config={"quant_method": "gptq"}), "it has quantized weights"),
}  # fmt: skip

# The same of architectures that only transformers can tell of: each takes its import.
REFUSED: Final[Mapping[str, tuple[Change, str]]] = {
    "an architecture that nobody knows": (config(model_type="wild", architectures=["Wild"]), "does not know it"),
    "a mixture of experts": (
        config(model_type="granitemoe", architectures=["GraniteMoeForCausalLM"], num_local_experts=4),
        "which no adapter of linears reaches",
    ),
    "a model with a state": (
        config(model_type="mamba", architectures=["MambaForCausalLM"]), "which no adapter of linears reaches",
    ),
}  # fmt: skip
