"""Base weights from safetensors files, checked, in the dtype that computes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.models import weight_files
from knapper.engine.models.config import ModelConfig


@dataclass(frozen=True)
class LayerWeights:
    """One layer. Linears with the same input are fused, rows stacked: `qkv`, `gate_up`."""

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
    """Frozen, without gradients. `head` (V, H) equals `embed` when the model ties them."""

    embed: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: FrozenLinear
    tied: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices, a tied head once."""
        linears = sum(
            linear.nbytes for layer in self.layers for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
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
    tensors = _Tensors(directory, config, torch.device(device))
    exactness = exactness or Exactness()

    def linear(*names: str, biased: bool = False) -> FrozenLinear:
        weights = [tensors.take(f"{name}.weight") for name in names]
        bias = torch.cat([tensors.take(f"{name}.bias") for name in names]).to(dtype) if biased else None
        return FrozenLinear(weights, dtype, bias, exactness=exactness)

    def norm(name: str) -> Tensor:
        return tensors.take(f"{name}.weight").to(dtype)

    def layer(index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        q, k, v, o = (f"{prefix}.self_attn.{name}_proj" for name in "qkvo")
        gate, up, down = (f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down"))
        return LayerWeights(
            input_norm=norm(f"{prefix}.input_layernorm"),
            qkv=linear(q, k, v, biased=config.attention_bias),
            q_norm=norm(f"{prefix}.self_attn.q_norm") if config.qk_norm else None,
            k_norm=norm(f"{prefix}.self_attn.k_norm") if config.qk_norm else None,
            o=linear(o, biased=config.output_bias),
            post_norm=norm(f"{prefix}.post_attention_layernorm"),
            gate_up=linear(gate, up),
            down=linear(down),
        )

    embed = tensors.take("model.embed_tokens.weight").to(dtype)
    layers = tuple(layer(index) for index in range(config.layers))
    last_norm = norm("model.norm")
    head = FrozenLinear([embed], dtype, exactness=exactness) if config.tied else linear("lm_head")
    return Weights(embed=embed, layers=layers, norm=last_norm, head=head, tied=config.tied)


class _Tensors:
    """Memory-mapped tensors by name, checked against the configuration."""

    def __init__(self, directory: Path, config: ModelConfig, device: torch.device) -> None:
        self._device = device
        headers = weight_files.expect_promised(directory, config)
        opened = {path: weight_files.opened(path, "pt") for path in {header.path for header in headers.values()}}
        self._files = {name: opened[header.path] for name, header in headers.items()}

    def take(self, name: str) -> Tensor:
        tensor: Tensor = self._files[name].get_tensor(name)  # type: ignore[no-untyped-call]  # the library has no types here
        return tensor.to(self._device)
