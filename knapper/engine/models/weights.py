"""Base weights from safetensors files, checked, in the dtype that computes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog
import torch
from safetensors import safe_open
from torch import Tensor

from knapper.engine.layers import paged_attention
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.experts import ExpertLinears
from knapper.engine.layers.gated_delta import GatedDeltaRecurrence
from knapper.engine.layers.layerwise import HEAD_PART
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.recurrence import Convolution
from knapper.engine.layers.state_space import StateSpaceRecurrence
from knapper.engine.models import weight_files
from knapper.engine.models.blocks import (
    AttentionBlock,
    ConvolutionBlock,
    DeltaBlock,
    ExpertSites,
    FeedForwardBlock,
    LatentBlock,
    LayerBlock,
    Mixer,
    MixtureBlock,
    RmsNorm,
    Sites,
    StateSpaceBlock,
)
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.layer import (
    Attention,
    LatentAttention,
    Layer,
    ScoreRule,
    SelfAttention,
)
from knapper.engine.models.layer import Mixer as MixerFacts
from knapper.engine.models.linear_shape import LinearShape
from knapper.engine.models.mlp import FeedForward, Mixture, MixtureNames
from knapper.engine.models.packed import PackedTensor
from knapper.engine.models.recurrent import GatedDelta, Mamba2, Recurrent, ShortConvolution
from knapper.engine.models.tensor_header import TensorHeader
from knapper.engine.models.unpack import unpacked
from knapper.limits import MIB

log = structlog.get_logger()
_LATENT_EPS: Final = 1e-6  # whatever config.json says of the other norms
_TELLS: Final = 8  # parts of a long load, each of which the log tells
_LONG_LOAD: Final = 4 << 30  # of bytes

Made = Callable[[int, Sequence[FrozenLinear | ExpertLinears]], None]


@dataclass(frozen=True)
class Weights:
    """Frozen, without gradients. `head` (V, H) equals `embed` when the model ties them."""

    embed: Tensor
    layers: tuple[LayerBlock, ...]
    norm: RmsNorm
    head: FrozenLinear
    tied: bool

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices, a tied head once."""
        linears = sum(linear.nbytes for layer in self.layers for linear in layer.linears)
        return linears + self.embed.nbytes + (0 if self.tied else self.head.nbytes)


def load(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    exactness: Exactness | None = None,
    linear: type[FrozenLinear] = FrozenLinear,
    made: Made | None = None,
) -> Weights:
    """The weights of `directory` (one file, or shards with an index), in `dtype` on `device`.

    `linear`: the kind that is made. `made`: gets each layer's linears, by number, as soon as they are made, so that
    none need be whole beside another's; at last the head's, as `HEAD_PART`.

    Raises NotFound without weight files, BrokenModel when a tensor is missing, unexpected or of another shape.
    """
    tensors = _Tensors(directory, config, torch.device(device), dtype)
    loader = _Loader(config, tensors, dtype, exactness or Exactness(), linear)
    embed = loader.tensor("model.embed_tokens.weight")
    layers: list[LayerBlock] = []
    for index, layer in enumerate(loader.layers()):
        layers.append(layer)
        if made is not None:
            made(index, layer.linears)
    norm = loader.norm(config.final_norm)
    head = linear([embed], dtype, exactness=loader.exactness) if config.tied else loader.linear(["lm_head"])
    if made is not None:
        made(HEAD_PART, [head])
    return Weights(embed=embed, layers=tuple(layers), norm=norm, head=head, tied=config.tied)


@dataclass(frozen=True)
class _Loader:
    """The blocks of a model's facts, of tensors by name."""

    config: ModelConfig
    tensors: "_Tensors"
    dtype: torch.dtype
    exactness: Exactness
    linear_type: type[FrozenLinear]

    def tensor(self, name: str) -> Tensor:
        return self.tensors.take(name).to(self.dtype)

    def linear(self, modules: Sequence[str], *, biased: bool = False) -> FrozenLinear:
        weights = [self.tensors.take(f"{module}.weight") for module in modules]
        bias = torch.cat([self.tensors.take(f"{module}.bias") for module in modules]).to(self.dtype) if biased else None
        return self.linear_type(weights, self.dtype, bias, exactness=self.exactness)

    def norm(self, module: str) -> RmsNorm:
        rule, weight = self.config.norm, self.tensor(f"{module}.weight")
        return RmsNorm(weight.float() + rule.offset if rule.wide else weight, self.config.rms_eps)

    def layers(self) -> Iterator[LayerBlock]:
        """In order. Of weights that take long the log says how far they are."""
        layers, nbytes = self.config.layers, self.tensors.nbytes
        tells = {len(layers) * part // _TELLS for part in range(1, _TELLS)} if nbytes > _LONG_LOAD else set()
        for index, layer in enumerate(layers):
            if index in tells:
                log.info("loading weights", layers=index, of=len(layers), file_mib=nbytes // MIB)
            yield self.layer(index, layer)

    def layer(self, index: int, layer: Layer) -> LayerBlock:
        names = layer.norms
        return LayerBlock(
            mixer=None if layer.mixer is None else self._mixer(index, layer.mixer),
            mlp=None if layer.mlp is None else self._mlp(index, layer.mlp),
            mixer_input=self._norm(index, names.mixer_input),
            mixer_output=self._norm(index, names.mixer_output),
            mlp_input=self._norm(index, names.mlp_input),
            mlp_output=self._norm(index, names.mlp_output),
            residual_scale=layer.residual_scale,
        )

    def _norm(self, index: int, name: str | None) -> RmsNorm | None:
        return None if name is None else self.norm(f"model.layers.{index}.{name}")

    def _mixer(self, index: int, mixer: MixerFacts) -> Mixer:
        match mixer:
            case SelfAttention() as facts:
                return self._attention(index, facts)
            case LatentAttention() as facts:
                return self._latent(index, facts)
            case ShortConvolution() as facts:
                return self._convolution(index, facts)
            case GatedDelta() as facts:
                return self._delta(index, facts)
            case Mamba2() as facts:
                return self._state_space(index, facts)

    def _number(self, index: int) -> int:
        """Of a layer, among those before it that keep the same kind of past: keys and values, or a state."""
        kind = Attention if isinstance(self.config.layers[index].mixer, Attention) else Recurrent
        return sum(isinstance(layer.mixer, kind) for layer in self.config.layers[:index])

    def _attention(self, index: int, facts: SelfAttention) -> AttentionBlock:
        hidden = self.config.hidden
        norms = [self.norm(f"model.layers.{index}.{name}") for name in facts.norms()]
        q_norm, k_norm = norms or (None, None)
        qkv, o = self._sites(index, facts.inputs(hidden)), self._sites(index, [facts.output(hidden)])
        scores = self._scores(facts)
        if facts.sinks:
            scores = replace(scores, sinks_H=self._float(index, f"{facts.block}.sinks"))
        facts = replace(facts, scores=scores)
        return AttentionBlock(facts, self._number(index), qkv, o, q_norm, k_norm)

    def _scores(self, facts: Attention) -> ScoreRule:
        sizes = facts.heads, facts.kv_heads, facts.head_dim
        layout = paged_attention.found_layout(self.exactness, *sizes, facts.scores, self.tensors.device)
        return replace(facts.scores, layout=layout)

    def _latent(self, index: int, facts: LatentAttention) -> LatentBlock:
        hidden, queries = self.config.hidden, facts.queries()
        facts = replace(facts, scores=self._scores(facts))
        weights = [self.tensor(f"model.layers.{index}.{name}.weight") for name in facts.norms()]
        norms = [RmsNorm(weight, _LATENT_EPS) for weight in weights]
        return LatentBlock(
            facts=facts,
            index=self._number(index),
            inputs=self._sites(index, facts.inputs(hidden)),
            queries=None if queries is None else self._sites(index, [queries]),
            keys_values=self._sites(index, [facts.keys_and_values()]),
            o=self._sites(index, [facts.output(hidden)]),
            q_norm=norms[0] if queries is not None else None,
            kv_norm=norms[-1],
        )

    def _convolution(self, index: int, facts: ShortConvolution) -> ConvolutionBlock:
        hidden = self.config.hidden
        inputs, output = self._sites(index, facts.inputs(hidden)), self._sites(index, [facts.output(hidden)])
        bias_H = self._float(index, "conv.conv.bias") if facts.biased else None
        convolution = Convolution(self._taps(index, "conv.conv.weight"), bias_H)
        return ConvolutionBlock(self._number(index), inputs, output, convolution)

    def _delta(self, index: int, facts: GatedDelta) -> DeltaBlock:
        hidden, at = self.config.hidden, "linear_attn"
        inputs, output = self._sites(index, facts.inputs(hidden)), self._sites(index, [facts.output(hidden)])
        convolution = Convolution(self._taps(index, f"{at}.conv1d.weight"))
        decay_H, bias_H = self._float(index, f"{at}.A_log").exp(), self._float(index, f"{at}.dt_bias")
        recurrence = GatedDeltaRecurrence(convolution, facts, decay_H, bias_H)
        norm = RmsNorm(self.tensor(f"model.layers.{index}.{at}.norm.weight"), self.config.rms_eps)
        return DeltaBlock(facts, self._number(index), inputs, output, recurrence, norm)

    def _state_space(self, index: int, facts: Mamba2) -> StateSpaceBlock:
        hidden, at = self.config.hidden, "mixer"
        inputs, output = self._sites(index, facts.inputs(hidden)), self._sites(index, [facts.output(hidden)])
        bias_X = self._float(index, f"{at}.conv1d.bias") if facts.biased else None
        convolution = Convolution(self._taps(index, f"{at}.conv1d.weight"), bias_X)
        decay_H, bias_H, skip_H = (self._float(index, f"{at}.{name}") for name in ("A_log", "dt_bias", "D"))
        recurrence = StateSpaceRecurrence(convolution, facts, decay_H.exp(), bias_H, skip_H)
        weight = self._float(index, f"{at}.norm.weight")
        return StateSpaceBlock(facts, self._number(index), inputs, output, recurrence, weight, self.config.rms_eps)

    def _taps(self, index: int, name: str) -> Tensor:
        """A convolution's weights (K, X)."""
        return self._float(index, name)[:, 0].T.contiguous()

    def _float(self, index: int, name: str) -> Tensor:
        """In float32 of the numbers that `dtype` can hold, as the model's own code computes with them."""
        return self.tensor(f"model.layers.{index}.{name}").float()

    def _mlp(self, index: int, facts: FeedForward | Mixture) -> FeedForwardBlock | MixtureBlock:
        hidden = self.config.hidden
        inputs, outputs = facts.inputs(hidden), [facts.output(hidden)]
        if isinstance(facts, FeedForward):
            return self._feed_forward(index, facts)
        wide = None if facts.routing.groups is None else torch.float32
        corrections = [self.tensors.take(f"model.layers.{index}.{name}").float() for name in facts.corrections()]
        return MixtureBlock(
            facts=facts,
            router=self._routers(index, facts.routers(hidden), wide),
            correction_E=corrections[0] if corrections else None,
            latents=tuple(self._sites(index, [shape]) for shape in facts.latents(hidden)),
            inputs=self._experts(index, inputs, facts.names),
            down=self._experts(index, outputs, facts.names),
            shared=None if facts.shared is None else self._feed_forward(index, facts.shared),
        )

    def _feed_forward(self, index: int, facts: FeedForward) -> FeedForwardBlock:
        hidden = self.config.hidden
        inputs, down = self._sites(index, facts.inputs(hidden)), self._sites(index, [facts.output(hidden)])
        return FeedForwardBlock(facts, inputs, down)

    def _experts(self, index: int, shapes: Sequence[LinearShape], names: MixtureNames) -> ExpertSites:
        """Of every expert its linears of the same input as one; of a tensor of all experts, views."""
        if shapes[0].whole:
            return self._whole_experts(index, shapes[0])
        joined = f"model.layers.{index}.{shapes[0].joined}"
        if shapes[0].joined is not None and joined in self.tensors:
            w_EOI = self.tensors.take(joined)
            w_EOI = w_EOI.transpose(1, 2).contiguous() if names.turned else w_EOI
            experts = [w_OI.split([shape.outputs for shape in shapes]) for w_OI in w_EOI]
            return ExpertSites(_names(index, shapes), self._linears(experts, w_EOI))
        modules = zip(*(shape.modules for shape in shapes), strict=True)
        parts = [[self.tensors.take(f"model.layers.{index}.{module}.weight") for module in own] for own in modules]
        return ExpertSites(_names(index, shapes), self._linears(parts))

    def _whole_experts(self, index: int, shape: LinearShape) -> ExpertSites:
        name = f"model.layers.{index}.{shape.module}"
        w_EOI = self.tensors.take(name).transpose(1, 2).contiguous()
        bias_EO, experts = self.tensor(f"{name}_bias"), [[w_OI] for w_OI in w_EOI]
        return ExpertSites(_names(index, [shape]), self._linears(experts, w_EOI, bias_EO))

    def _linears(
        self, experts: Sequence[Sequence[Tensor]], w_EOI: Tensor | None = None, bias_EO: Tensor | None = None
    ) -> ExpertLinears:
        return ExpertLinears(experts, self.dtype, self.exactness, w_EOI, bias_EO, self.linear_type)

    def _routers(self, index: int, shapes: Sequence[LinearShape], dtype: torch.dtype | None) -> Sites:
        """As one: a product with a single output has no bits to promise."""
        weights = [self.tensors.take(f"model.layers.{index}.{shape.module}.weight") for shape in shapes]
        biases = [self.tensors.take(f"model.layers.{index}.{s.module}.bias") for s in shapes if s.biased]
        bias = torch.cat(biases).to(dtype or self.dtype) if biases else None
        linear = self.linear_type(weights, dtype or self.dtype, bias, adapted=False, exactness=self.exactness)
        return Sites(_names(index, shapes), linear)

    def _sites(self, index: int, shapes: Sequence[LinearShape]) -> Sites:
        """Linears of the same input as one, rows stacked."""
        modules = [f"model.layers.{index}.{shape.module}" for shape in shapes]
        return Sites(_names(index, shapes), self.linear(modules, biased=shapes[0].biased))


def _names(index: int, shapes: Sequence[LinearShape]) -> tuple[str, ...]:
    return tuple(f"layers.{index}.{shape.name}" for shape in shapes)


class _Tensors:
    """Memory-mapped tensors by name, checked against the configuration; packed ones in `dtype`, made when taken."""

    def __init__(self, directory: Path, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self._dtype = device, dtype
        self._found = weight_files.expect_promised(directory, config)
        self._opened: dict[Path, safe_open] = {}

    @property
    def nbytes(self) -> int:
        """Of the files."""
        parts = [each.parts.values() if isinstance(each, PackedTensor) else [each] for each in self._found.values()]
        return sum(header.nbytes for headers in parts for header in headers)

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def take(self, name: str) -> Tensor:
        found = self._found[name]
        if isinstance(found, PackedTensor):
            return unpacked(found, lambda end: self._stored(found.parts[end]), self._dtype)
        return self._stored(found)

    def _stored(self, header: TensorHeader) -> Tensor:
        file = self._opened.get(header.path) or weight_files.opened(header.path, "pt")
        self._opened[header.path] = file
        tensor: Tensor = file.get_tensor(header.stored)  # type: ignore[no-untyped-call]  # the library has no types here
        return tensor.to(self.device)
