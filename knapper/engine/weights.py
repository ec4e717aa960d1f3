"""Base weights from safetensors files: named, complete, of the right shape, in the dtype that computes."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from knapper.engine.config import ModelConfig
from knapper.errors import NotFound, UserError


class BrokenModel(UserError):
    """The weight files do not hold the tensors that config.json promises."""

    code = "broken_model"


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Linears that read the same input are one tensor, rows stacked: `qkv`, `gate_up`."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Weights:
    """Frozen: no gradient ever. `head` (V, H) is `embed` itself when the model ties them."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor

    @property
    def nbytes(self) -> int:
        """Of the large ones: all matrices, a tied head once."""
        linears = sum(one.nbytes for layer in self.layers for one in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return linears + self.embed.nbytes + (0 if self.head is self.embed else self.head.nbytes)


def load(
    directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Weights:
    """The weights of `directory` (one file, or shards with an index), in `dtype` on `device`.

    Raises NotFound without weight files, BrokenModel when a tensor is missing, unexpected or of another shape.
    """
    tensors = _Tensors(directory, dtype, torch.device(device))
    hidden, inner, head_dim = config.hidden, config.intermediate, config.head_dim
    q_rows, kv_rows = config.heads * head_dim, config.kv_heads * head_dim

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        parts = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
        qkv = torch.cat([tensors.take(f"{attention}.{name}.weight", rows, hidden) for name, rows in parts])
        return LayerWeights(
            input_norm=tensors.take(f"{at}.input_layernorm.weight", hidden),
            qkv=qkv,
            qkv_bias=torch.cat([tensors.take(f"{attention}.{name}.bias", rows) for name, rows in parts])
            if config.attention_bias
            else None,
            q_norm=tensors.take(f"{attention}.q_norm.weight", head_dim) if config.qk_norm else None,
            k_norm=tensors.take(f"{attention}.k_norm.weight", head_dim) if config.qk_norm else None,
            o=tensors.take(f"{attention}.o_proj.weight", hidden, q_rows),
            o_bias=tensors.take(f"{attention}.o_proj.bias", hidden) if config.output_bias else None,
            post_norm=tensors.take(f"{at}.post_attention_layernorm.weight", hidden),
            gate_up=torch.cat(
                [tensors.take(f"{mlp}.{name}.weight", inner, hidden) for name in ("gate_proj", "up_proj")]
            ),
            down=tensors.take(f"{mlp}.down_proj.weight", hidden, inner),
        )

    embed = tensors.take("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = tuple(layer(index) for index in range(config.layers))
    norm = tensors.take("model.norm.weight", hidden)
    if config.tied:
        head = embed
        tensors.ignore("lm_head.weight")
    else:
        head = tensors.take("lm_head.weight", config.vocab_size, hidden)
    tensors.finish()
    return Weights(embed=embed, layers=layers, norm=norm, head=head)


class _Tensors:
    """Memory-mapped tensors by name, each taken once."""

    def __init__(self, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._directory, self._dtype, self._device = directory, dtype, device
        self._files = {path: _open(path) for path in _paths(directory)}
        self._left = {name: file for file in self._files.values() for name in _names(file)}

    def take(self, name: str, *shape: int) -> Tensor:
        file = self._left.pop(name, None)
        if file is None:
            raise BrokenModel(f"{self._directory}: tensor {name} is missing; config.json promises it as {list(shape)}")
        found = list(file.get_slice(name).get_shape())  # type: ignore[no-untyped-call]  # the library has no types here
        if found != list(shape):
            raise BrokenModel(f"{self._directory}: tensor {name} is {found}; config.json makes it {list(shape)}")
        tensor: Tensor = file.get_tensor(name)  # type: ignore[no-untyped-call]  # the library has no types here
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise BrokenModel(
                f"{self._directory}: tensor {name} is {tensor.dtype}; allowed: bfloat16, float16, float32"
            )
        return tensor.to(self._device, self._dtype)

    def ignore(self, name: str) -> None:
        self._left.pop(name, None)

    def finish(self) -> None:
        extra = sorted(name for name in self._left if not name.endswith("rotary_emb.inv_freq"))
        if extra:
            shown = ", ".join(extra[:5]) + (", ..." if len(extra) > 5 else "")
            raise BrokenModel(f"{self._directory}: {len(extra)} tensors that the architecture does not have: {shown}")


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BrokenModel(f"{path} cannot be read as safetensors: {error}") from error


def _names(file: safe_open) -> list[str]:
    return list(file.keys())  # type: ignore[no-untyped-call]  # the library has no types here


def _paths(directory: Path) -> list[Path]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise NotFound(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise BrokenModel(f"{index} is not a safetensors index: {error!r}") from error
    # A name with a directory in it could leave the model's own.
    paths = [directory / Path(name).name for name in names]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise BrokenModel(f"{directory}: shards named by the index are missing: {', '.join(missing)}")
    return paths
