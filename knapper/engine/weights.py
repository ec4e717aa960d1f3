"""Base weights from safetensors files: named, complete, of the right shape, in the dtype that computes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from knapper.engine.config import ModelConfig
from knapper.engine.exactness import Exactness
from knapper.engine.linear import FrozenLinear
from knapper.errors import NotFound, UserError


class BrokenModel(UserError):
    """The weight files do not hold the tensors that config.json promises."""

    code = "broken_model"


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Linears that read the same input are one, rows stacked: `qkv`, `gate_up`."""

    input_norm: Tensor
    qkv: FrozenLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: FrozenLinear
    post_norm: Tensor
    gate_up: FrozenLinear
    down: FrozenLinear


@dataclass(frozen=True)
class Weights:
    """Frozen: no gradient ever. `head` (V, H) has the numbers of `embed` when the model ties them."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: FrozenLinear
    tied: bool

    @property
    def nbytes(self) -> int:
        """Of the large ones: all matrices, a tied head once."""
        linears = sum(one.nbytes for layer in self.layers for one in (layer.qkv, layer.o, layer.gate_up, layer.down))
        return linears + self.embed.nbytes + (0 if self.tied else self.head.nbytes)


def load(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    exactness: Exactness | None = None,
) -> Weights:
    """The weights of `directory` (one file, or shards with an index), in `dtype` on `device`.

    Raises NotFound without weight files, BrokenModel when a tensor is missing, unexpected or of another shape.
    """
    tensors = _Tensors(directory, torch.device(device))
    exactness = exactness or Exactness()
    hidden, inner, head_dim = config.hidden, config.intermediate, config.head_dim
    q_rows, kv_rows = config.heads * head_dim, config.kv_heads * head_dim

    def linear(names: Sequence[str], rows: Sequence[int], inputs: int, *, biased: bool = False) -> FrozenLinear:
        parts = list(zip(names, rows, strict=True))
        weights = [tensors.take(f"{name}.weight", count, inputs) for name, count in parts]
        bias = torch.cat([tensors.take(f"{name}.bias", count) for name, count in parts]).to(dtype) if biased else None
        return FrozenLinear(weights, dtype, bias, exactness=exactness)

    def norm(name: str, width: int) -> Tensor:
        return tensors.take(f"{name}.weight", width).to(dtype)

    def layer(index: int) -> LayerWeights:
        at = f"model.layers.{index}"
        q, k, v, o = (f"{at}.self_attn.{name}_proj" for name in "qkvo")
        gate, up, down = (f"{at}.mlp.{name}_proj" for name in ("gate", "up", "down"))
        return LayerWeights(
            input_norm=norm(f"{at}.input_layernorm", hidden),
            qkv=linear([q, k, v], [q_rows, kv_rows, kv_rows], hidden, biased=config.attention_bias),
            q_norm=norm(f"{at}.self_attn.q_norm", head_dim) if config.qk_norm else None,
            k_norm=norm(f"{at}.self_attn.k_norm", head_dim) if config.qk_norm else None,
            o=linear([o], [hidden], q_rows, biased=config.output_bias),
            post_norm=norm(f"{at}.post_attention_layernorm", hidden),
            gate_up=linear([gate, up], [inner, inner], hidden),
            down=linear([down], [hidden], inner),
        )

    embed = tensors.take("model.embed_tokens.weight", config.vocab_size, hidden).to(dtype)
    layers = tuple(layer(index) for index in range(config.layers))
    last_norm = norm("model.norm", hidden)
    if config.tied:
        head = FrozenLinear([embed], dtype, exactness=exactness)
        tensors.ignore("lm_head.weight")
    else:
        head = linear(["lm_head"], [config.vocab_size], hidden)
    tensors.finish()
    return Weights(embed=embed, layers=layers, norm=last_norm, head=head, tied=config.tied)


class _Tensors:
    """Memory-mapped tensors by name, each taken once."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._directory, self._device = directory, device
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
        return tensor.to(self._device)

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
