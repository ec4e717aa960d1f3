"""The computation of a layer: its mixer, its MLP, and the norms around them.

A block is made by `weights.load` of the facts in `layer`, holds frozen weights, and takes rows. N rows, H hidden size.
Sources: the block of Llama, arXiv 2302.13971 (pre-norm, RMS norm, SwiGLU of arXiv 2002.05202, rotary positions), with
grouped queries of arXiv 2305.13245 and the q/k norm of Qwen3, arXiv 2505.09388.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers import elementwise, experts, rope
from knapper.engine.layers.adapters import Adapt
from knapper.engine.layers.attention import Attend
from knapper.engine.layers.experts import ExpertLinears
from knapper.engine.layers.gated_delta import GatedDeltaRecurrence
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.recurrence import Convolution
from knapper.engine.layers.rope import CosSin
from knapper.engine.layers.routing import Dispatch, combined, routed, spread
from knapper.engine.layers.state_space import StateSpaceRecurrence
from knapper.engine.models.layer import LatentAttention, SelfAttention
from knapper.engine.models.mlp import Activation, ClampedSwish, FeedForward, Mixture
from knapper.engine.models.recurrent import GatedDelta, Mamba2
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
class ExpertSites:
    """A frozen linear of every expert, and the adapters' target modules that it stacks."""

    names: tuple[str, ...]
    linears: ExpertLinears

    def __call__(self, x_S: Tensor, dispatch: Dispatch, adapt: Adapt) -> tuple[Tensor, ...]:
        return experts.adapted(self.names, x_S, self.linears, dispatch, adapt.loras)


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
    """`index`: the layer's number among those with attention, by which its keys and values are kept."""

    facts: SelfAttention
    index: int
    qkv: Sites
    o: Sites
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        facts, gate = self.facts, None
        q, k, v = self._separate(self.qkv(x_NH, rows.adapt))
        if facts.gated:
            q, gate = (part.flatten(1) for part in q.unflatten(1, (facts.heads, -1)).chunk(2, dim=2))
        if facts.qk_norm == "width":
            q, k = self._normed(q, k)
        q, k, v = (x.unflatten(1, (-1, facts.head_dim)) for x in (q, k, v))
        if facts.qk_norm == "head":
            q, k = self._normed(q, k)
        if facts.rope is not None:
            q, k = (rope.rotated(x, rows.cos_sin[facts.rope], facts.rope) for x in (q, k))
        o = rows.attend(self.index, *(x.to(rows.attention_dtype) for x in (q, k, v)), scores=facts.scores)
        o = o.to(x_NH.dtype)
        return self.o(o if gate is None else o * elementwise.sigmoid(gate), rows.adapt)[0]

    def _separate(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        facts = self.facts
        return parts[0].split((facts.q_width, facts.kv_width, facts.kv_width), dim=1) if facts.fused else parts

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        return self.qkv.linear, self.o.linear


@dataclass(frozen=True)
class LatentBlock:
    """`index`: as of `AttentionBlock`. `inputs`: of the residual; `queries` and `keys_values`: of the latents."""

    facts: LatentAttention
    index: int
    inputs: Sites
    queries: Sites | None
    keys_values: Sites
    o: Sites
    q_norm: RmsNorm | None
    kv_norm: RmsNorm

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        facts, adapt = self.facts, rows.adapt
        q, latents = self.inputs(x_NH, adapt)
        if self.queries is not None and self.q_norm is not None:
            (q,) = self.queries(self.q_norm(q), adapt)
        latent, turning = latents.split((facts.kv_rank, facts.rope_dim), dim=1)
        (kv,) = self.keys_values(self.kv_norm(latent), adapt)
        q, kv = (x.unflatten(1, (facts.heads, -1)) for x in (q, kv))
        k, v = kv.split((facts.plain_dim, facts.value_dim), dim=2)
        q = self._joined(q[..., : facts.plain_dim], q[..., facts.plain_dim :], rows)
        k = self._joined(k, turning[:, None], rows)
        o = rows.attend(self.index, *(self._wide(x, rows.attention_dtype) for x in (q, k, v)), scores=facts.scores)
        o = o.unflatten(1, (facts.heads, -1))[..., : facts.value_dim].flatten(1)
        return self.o(o.to(x_NH.dtype), adapt)[0]

    def _joined(self, plain_NHD: Tensor, turning_NHD: Tensor, rows: PassRows) -> Tensor:
        """With the rotated part, which may be one for all heads."""
        turned = rope.rotated(turning_NHD, rows.cos_sin[self.facts.rope], self.facts.rope)
        return torch.cat([plain_NHD.float(), turned.expand(-1, self.facts.heads, -1)], dim=2)

    def _wide(self, x_NHD: Tensor, dtype: torch.dtype) -> Tensor:
        return F.pad(x_NHD.to(dtype), (0, self.facts.head_dim - x_NHD.shape[2]))

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        inner = () if self.queries is None else (self.queries.linear,)
        return (self.inputs.linear, *inner, self.keys_values.linear, self.o.linear)


@dataclass(frozen=True)
class ConvolutionBlock:
    """`index`: the layer's number among those with a state."""

    index: int
    inputs: Sites
    output: Sites
    convolution: Convolution

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        b, c, x = self.inputs(x_NH, rows.adapt)[0].chunk(3, dim=1)
        y_NH, _ = rows.attend.recur(self.index, self.convolution, (b * x).float())
        return self.output(c * y_NH.to(c.dtype), rows.adapt)[0]

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        return self.inputs.linear, self.output.linear


@dataclass(frozen=True)
class FeedForwardBlock:
    facts: FeedForward
    inputs: Sites
    down: Sites

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        parts = self.inputs(x_NH, rows.adapt)
        parts = parts[0].chunk(2, dim=1) if self.facts.fused else parts
        return self.down(_activated(parts, self.facts.activation), rows.adapt)[0]

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        return self.inputs.linear, self.down.linear


@dataclass(frozen=True)
class MixtureBlock:
    """Each row goes through its experts; what they give is added, weighted by the router.

    `router`: with the linear of the shared one's weight, if it has one. `correction_E`: where there are groups; their
    router computes in float32. `latents`: before and behind the experts, where they compute in fewer numbers.
    """

    facts: Mixture
    router: Sites
    correction_E: Tensor | None
    latents: tuple[Sites, ...]
    inputs: ExpertSites
    down: ExpertSites
    shared: FeedForwardBlock | None

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        adapt, routing = rows.adapt, self.facts.routing
        logits_NE, *gates = self.router(x_NH.to(self.router.linear.dtype), adapt)
        weights_NK, experts_NK = routed(logits_NE, routing, self.correction_E)
        numbers_N = adapt.numbers(len(x_NH), x_NH.device)
        dispatch = Dispatch.of(experts_NK, routing.experts, numbers_N, len(adapt.loras))
        taken_NH = self.latents[0](x_NH, adapt)[0] if self.latents else x_NH
        parts = self.inputs(spread(taken_NH, dispatch), dispatch, adapt)
        parts = (parts[0][:, ::2], parts[0][:, 1::2]) if self.facts.names.whole else parts
        (y_SH,) = self.down(_activated(parts, self.facts.activation), dispatch, adapt)
        y_NH = combined(y_SH, weights_NK, dispatch)
        if self.latents:
            (y_NH,) = self.latents[1](y_NH, adapt)
        if self.shared is None:
            return y_NH
        shared_NH = self.shared(x_NH, rows)
        return y_NH + (elementwise.sigmoid(gates[0]) * shared_NH if gates else shared_NH)

    @property
    def linears(self) -> tuple[FrozenLinear | ExpertLinears, ...]:
        shared = () if self.shared is None else self.shared.linears
        latents = tuple(sites.linear for sites in self.latents)
        return (self.router.linear, *latents, self.inputs.linears, self.down.linears, *shared)


def _activated(parts: Sequence[Tensor], activation: Activation) -> Tensor:
    """Of gate and up, or of up alone. Source of the squared ReLU: arXiv 2109.08668, section 4.1."""
    if activation == "relu2":
        return torch.relu(parts[0]).square()
    gate, up = parts
    if isinstance(activation, ClampedSwish):
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return (up + 1) * (gate * elementwise.sigmoid(gate * activation.alpha))
    return (elementwise.silu(gate) if activation == "silu" else elementwise.gelu_tanh(gate)) * up


@dataclass(frozen=True)
class DeltaBlock:
    """`index`: the layer's number among those with a state."""

    facts: GatedDelta
    index: int
    inputs: Sites
    output: Sites
    recurrence: GatedDeltaRecurrence
    norm: RmsNorm

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        mixed, z, b, a = self._separate(self.inputs(x_NH, rows.adapt))
        y_NY, _ = rows.attend.recur(self.index, self.recurrence, torch.cat([mixed, b, a], dim=1).float())
        y_NHE = self.norm(y_NY.unflatten(1, (self.facts.value_heads, -1)).to(x_NH.dtype))
        gated = y_NHE.flatten(1) * elementwise.silu(z.float())
        return self.output(gated.to(x_NH.dtype), rows.adapt)[0]

    def _separate(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Queries, keys and values as one, the output's gate, and the rule's two gates, by value head."""
        facts = self.facts
        if not facts.fused:
            return parts
        shared = facts.value_heads // facts.key_heads
        qkvz, ba = (part.unflatten(1, (facts.key_heads, -1)) for part in parts)
        q, k, v, z = qkvz.split((facts.key_dim, facts.key_dim, *2 * (shared * facts.value_dim,)), dim=2)
        b, a = ba.chunk(2, dim=2)
        q, k, v, z, b, a = (part.flatten(1) for part in (q, k, v, z, b, a))
        return torch.cat([q, k, v], dim=1), z, b, a

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        return self.inputs.linear, self.output.linear


@dataclass(frozen=True)
class StateSpaceBlock:
    """`index`: the layer's number among those with a state. `norm_X`: of the norm by group, float32, and its `eps`."""

    facts: Mamba2
    index: int
    inputs: Sites
    output: Sites
    recurrence: StateSpaceRecurrence
    norm_X: Tensor
    eps: float

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        (mixed,) = self.inputs(x_NH, rows.adapt)
        gate, taken = mixed.split((self.facts.value_width, self.facts.conv_width + self.facts.heads), dim=1)
        y_NX, _ = rows.attend.recur(self.index, self.recurrence, taken.float())
        y_NX = y_NX * elementwise.silu(gate.float())
        y_NGX = y_NX.unflatten(1, (self.facts.groups, -1))
        y_NGX = y_NGX * torch.rsqrt(y_NGX.square().mean(-1, keepdim=True) + self.eps)
        return self.output((y_NGX.flatten(1) * self.norm_X).to(x_NH.dtype), rows.adapt)[0]

    @property
    def linears(self) -> tuple[FrozenLinear, ...]:
        return self.inputs.linear, self.output.linear


# The kinds that a layer may have: another is a type of these unions.
Mixer = AttentionBlock | LatentBlock | ConvolutionBlock | DeltaBlock | StateSpaceBlock
Mlp = FeedForwardBlock | MixtureBlock


@dataclass(frozen=True)
class LayerBlock:
    """x + r mixer(x), then x + r mlp(x), or the one of them that there is, between the norms that there are."""

    mixer: Mixer | None
    mlp: Mlp | None
    mixer_input: RmsNorm | None
    mixer_output: RmsNorm | None
    mlp_input: RmsNorm | None
    mlp_output: RmsNorm | None
    residual_scale: float

    def __call__(self, x_NH: Tensor, rows: PassRows) -> Tensor:
        if self.mixer is not None:
            x_NH = self._added(x_NH, self.mixer(_normed(x_NH, self.mixer_input), rows), self.mixer_output)
        if self.mlp is not None:
            x_NH = self._added(x_NH, self.mlp(_normed(x_NH, self.mlp_input), rows), self.mlp_output)
        return x_NH

    def _added(self, x_NH: Tensor, y_NH: Tensor, norm: RmsNorm | None) -> Tensor:
        y_NH = _normed(y_NH, norm)
        return x_NH + (y_NH if self.residual_scale == 1.0 else y_NH * self.residual_scale)

    @property
    def linears(self) -> tuple[FrozenLinear | ExpertLinears, ...]:
        return tuple(linear for part in (self.mixer, self.mlp) if part is not None for linear in part.linears)


def _normed(x_NH: Tensor, norm: RmsNorm | None) -> Tensor:
    return x_NH if norm is None else norm(x_NH)
