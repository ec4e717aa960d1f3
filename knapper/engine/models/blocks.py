"""The computation of a layer: its mixer, its MLP, and the norms around them.

A block is made by `weights.load` of the facts in `layer`, holds frozen weights, and takes rows. N rows, H hidden size.
Sources: the block of Llama, arXiv 2302.13971 (pre-norm, RMS norm, SwiGLU of arXiv 2002.05202, rotary positions), with
grouped queries of arXiv 2305.13245 and the q/k norm of Qwen3, arXiv 2505.09388.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers import rope
from knapper.engine.layers.adapters import Adapt
from knapper.engine.layers.attention import Attend
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.rope import CosSin
from knapper.engine.models.layer import GatedMlp, SelfAttention
from knapper.engine.models.rotary import Rope


@dataclass(frozen=True)
class PassRows:
    """What a pass brings to every layer: how its rows attend, which adapters they use, and where they stand."""

    attend: Attend
    adapt: Adapt
    attention_dtype: torch.dtype
    cos_sin: Mapping[Rope, CosSin]


@dataclass(frozen=True)
class Sites:
    """A frozen linear, and the adapters' target modules that it stacks."""

    names: tuple[str, ...]
    linear: FrozenLinear

    def __call__(self, x_N: Tensor, adapt: Adapt) -> tuple[Tensor, ...]:
        return adapt(self.names, x_N, self.linear)


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps), in float32, then scaled in the weight's dtype.

    Source: RMS norm, arXiv 1910.07467, equation 4; dtypes as transformers' LlamaRMSNorm has them with a weight of the
    base's dtype, Gemma's and OLMo's with one of float32.
    """

    weight: Tensor
    eps: float

    def __call__(self, x_N: Tensor) -> Tensor:
        if x_N.device.type == "cuda" and x_N.dtype == self.weight.dtype:
            return F.rms_norm(x_N, self.weight.shape, self.weight, self.eps)  # one kernel, forward and back
        wide = x_N.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed.to(self.weight.dtype) * self.weight).to(x_N.dtype)


@dataclass(frozen=True)
class AttentionBlock:
    """`index`: the layer's number, by which its keys and values are kept."""

    facts: SelfAttention
    index: int
    qkv: Sites
    o: Sites
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        facts = self.facts
        q, k, v = self._separate(self.qkv(x_NH, rows.adapt))
        if facts.qk_norm == "width":
            q, k = self._normed(q, k)
        q, k, v = (x.unflatten(1, (-1, facts.head_dim)) for x in (q, k, v))
        if facts.qk_norm == "head":
            q, k = self._normed(q, k)
        if facts.rope is not None:
            q, k = (rope.rotated(x, rows.cos_sin[facts.rope], facts.rope) for x in (q, k))
        o = rows.attend(self.index, *(x.to(rows.attention_dtype) for x in (q, k, v)), scores=facts.scores)
        return self.o(o.to(x_NH.dtype), rows.adapt)[0]

    def _separate(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        facts = self.facts
        return parts[0].split((facts.q_width, facts.kv_width, facts.kv_width), dim=1) if facts.fused else parts

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)


@dataclass(frozen=True)
class GatedMlpBlock:
    facts: GatedMlp
    gate_up: Sites
    down: Sites

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        parts = self.gate_up(x_NH, rows.adapt)
        gate, up = parts[0].chunk(2, dim=1) if self.facts.fused else parts
        active = F.silu(gate) if self.facts.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down(active * up, rows.adapt)[0]


Mixer = AttentionBlock  # the kinds that a layer may have: another is a type of this union
Mlp = GatedMlpBlock


@dataclass(frozen=True)
class LayerBlock:
    """x + r mixer(x), then x + r mlp(x), between the norms that there are."""

    mixer: Mixer
    mlp: Mlp
    mixer_input: RmsNorm | None
    mixer_output: RmsNorm | None
    mlp_input: RmsNorm | None
    mlp_output: RmsNorm | None
    residual_scale: float

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        x_NH = self._added(x_NH, self.mixer(_normed(x_NH, self.mixer_input), rows), self.mixer_output)
        return self._added(x_NH, self.mlp(_normed(x_NH, self.mlp_input), rows), self.mlp_output)

    def _added(self, x_NH: Tensor, y_NH: Tensor, norm: RmsNorm | None) -> Tensor:
        y_NH = _normed(y_NH, norm)
        return x_NH + (y_NH if self.residual_scale == 1.0 else y_NH * self.residual_scale)

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        return tuple(sites.linear for sites in (self.mixer.qkv, self.mixer.o, self.mlp.gate_up, self.mlp.down))


def _normed(x_NH: Tensor, norm: RmsNorm | None) -> Tensor:
    return x_NH if norm is None else norm(x_NH)
