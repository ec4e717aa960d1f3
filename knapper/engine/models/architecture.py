"""What a family's file states of an architecture: how it differs from plain Llama.

Facts about config.json and the layers; their source is transformers' `modeling_<model_type>.py`. A formula that no row
has yet (another norm, activation or mixer) first needs that code in `blocks` or `engine.layers`, and a field here that
turns it on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from knapper.engine.models import packed
from knapper.engine.models.fields import Raw, UnsupportedModel, number, optional, size
from knapper.engine.models.layer import (
    PRE_NORMS,
    Attention,
    LatentAttention,
    Layer,
    Mixer,
    Norms,
    QkNorm,
    ScoreRule,
    SelfAttention,
)
from knapper.engine.models.mixture_rule import Bias, Layers, MixtureRule, always, every_layer, never, no_layer
from knapper.engine.models.mlp import PLAIN_MLP, Activation, FeedForward, Mixture, MlpNames, Routing
from knapper.engine.models.recurrent import Recurrent
from knapper.engine.models.rotary import FULL, SLIDING, LayerType, Rope, RopeRule, served_context

Part = Literal["mixer", "mlp"]
Option = Callable[[Raw], str]  # the part that the decoder does not compute, for the error message; empty if none
ACTIVATIONS: Final[Mapping[str, Activation]] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def by_option(raw: Raw) -> bool:
    return bool(raw.get("attention_bias", False))


def by_default(raw: Raw) -> bool:
    """As `by_option`, of an architecture whose silent configuration means biases."""
    return bool(raw.get("attention_bias", True))


def by_norm_topk_prob(raw: Raw) -> bool:
    return bool(raw.get("norm_topk_prob", False))


def mlp_bias(raw: Raw) -> str:
    return "mlp_bias" if raw.get("mlp_bias", False) else ""


def bidirectional(raw: Raw) -> str:
    return "use_bidirectional_attention" if raw.get("use_bidirectional_attention") else ""


OPTIONS: Final[tuple[Option, ...]] = (mlp_bias, packed.refusal)


@dataclass(frozen=True)
class Windows:
    """Which layers attend over the last `sliding_window` tokens only.

    `slides`: where config.json does not list `layer_types`. `switched`: only with `use_sliding_window`, as Qwen's
    configurations always have a size. `size`: where config.json is silent.
    """

    slides: Layers
    listed: bool = True
    switched: bool = False
    size: int | None = None

    def read(self, raw: Raw, path: Path, index: int) -> int | None:
        window = optional(raw, "sliding_window", path, self.size)
        if window is None or (self.switched and not raw.get("use_sliding_window", False)):
            return None
        slides = self._type(raw, path, index) == SLIDING if self._lists(raw) else self.slides(raw, index)
        return int(window) if slides else None

    def _lists(self, raw: Raw) -> bool:
        return self.listed and raw.get("layer_types") is not None

    @staticmethod
    def _type(raw: Raw, path: Path, index: int) -> LayerType:
        types = raw["layer_types"]
        expected = isinstance(types, list) and len(types) == raw.get("num_hidden_layers")
        if not expected or types[index] not in (FULL, SLIDING):
            raise UnsupportedModel(f"{path}: layer_types is {types!r}; expected {FULL} or {SLIDING} for each layer")
        kind: LayerType = types[index]
        return kind


@dataclass(frozen=True)
class Multiplier:
    """A factor that config.json states under `name`; 1 where it is silent."""

    name: str

    def __call__(self, raw: Raw, path: Path) -> float:
        return number(raw, self.name, path, 1.0)


def one(raw: Raw, path: Path) -> float:  # noqa: ARG001  the multiplier of most architectures
    return 1.0


Factor = Callable[[Raw, Path], float]


@dataclass(frozen=True)
class RecurrentLayers:
    """Layers with another mixer than attention. `read`: a layer's, or None for one with attention; `like`: one of their
    kind, for docs/models.md, and `described` the words for it.
    """

    read: Callable[[Raw, Path, int], Recurrent | None]
    like: Recurrent
    described: str


def plain_width(raw: Raw, path: Path) -> int:
    return size(raw, "intermediate_size", path)


def tie_word_embeddings(raw: Raw, default: bool) -> bool:
    return bool(raw.get("tie_word_embeddings", default))


@dataclass(frozen=True)
class Names:
    """Modules that an architecture names in its own way, and the field of config.json for the norms' epsilon."""

    attention: str = "self_attn"
    output: str = "o_proj"
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")
    mlp: MlpNames = PLAIN_MLP
    final_norm: str = "model.norm"
    eps_field: str = "rms_norm_eps"


def by_num_hidden_layers(raw: Raw, path: Path) -> int:
    return size(raw, "num_hidden_layers", path)


@dataclass(frozen=True)
class NormRule:
    """How an RMS norm's weight multiplies: in the base's dtype, or with `wide` in float32, `offset` added to it."""

    wide: bool = False
    offset: float = 0.0


PLAIN_NORM: Final = NormRule()
NO_WINDOWS: Final = Windows(no_layer)
PLAIN_ROPE: Final = RopeRule()
PLAIN_NAMES: Final = Names()


@dataclass(frozen=True)
class Architecture:
    """One `model_type`. `models`: well-known ones, for docs/models.md.

    `qk_normed`: when there are these norms. `qkv_bias`, `output_bias`: when q, k, v and o have biases. `fused_qkv`,
    `fused_gate_up`: these linears are one in the file. `gated_attention`: a gate for each head's output. `sinks`: a
    score beside those of its keys. `without_positions`: layers that do not rotate queries and keys. `activation_field`:
    where config.json names the MLP's; `gelu`: which it means by "gelu". `attention_scale`: of q k; None: the root of a
    head's width, inverted. `caps`: config.json may cap scores and logits, where it is silent at `attention_cap` and
    `logits_cap`. `residual`, `embedding`, `logits`: what multiplies a layer's outputs and embeddings, and divides
    logits. `recurrent`: layers without attention. `count`: of layers. `lone`: whether a layer is a mixer or an MLP
    alone, and which; None: each has both. `mixture`: experts in place of MLPs; None: a dense model. `mlp_width`: of the
    MLP, `ties_by`: whether the head is the embedding, where config.json says it in another way. `indexed`: where it
    says how many keys an index chooses for a row; up to so many tokens that is all of them, and only these are served.
    `unread`: tensors of a layer that no such text needs. `refused`: options to check. `activation`, `head_dim`,
    `rms_eps`, `tied`: what a config.json that is silent about them means.
    """

    model_type: str
    models: str
    qk_norm: QkNorm | None = None
    qk_normed: Bias = always
    qkv_bias: Bias = by_option
    output_bias: Bias = by_option
    fused_qkv: bool = False
    fused_gate_up: bool = False
    mixture: MixtureRule | None = None
    gated_attention: bool = False
    sinks: bool = False
    latent: Callable[[Raw, Path], LatentAttention] | None = None
    norms: Norms = PRE_NORMS
    norm: NormRule = PLAIN_NORM
    windows: Windows = NO_WINDOWS
    rope: RopeRule = PLAIN_ROPE
    without_positions: Layers = no_layer
    activation: str = "silu"
    activation_field: str = "hidden_act"
    activations: Mapping[str, Activation] = field(default_factory=lambda: ACTIVATIONS)
    gelu: str = "gelu"
    attention_scale: Factor | None = None
    caps: bool = False
    attention_cap: float | None = None
    logits_cap: float | None = None
    residual: Factor = one
    embedding: Factor = one
    logits: Factor = one
    recurrent: RecurrentLayers | None = None
    count: Callable[[Raw, Path], int] = by_num_hidden_layers
    lone: Callable[[Raw, Path, int], Part] | None = None
    mlp_width: Callable[[Raw, Path], int] = plain_width
    indexed: str | None = None
    unread: tuple[str, ...] = ()
    names: Names = PLAIN_NAMES
    ties_by: Callable[[Raw, bool], bool] = tie_word_embeddings
    refused: tuple[Option, ...] = OPTIONS
    head_dim: int | None = None
    rms_eps: float = 1e-6
    tied: bool = False
    also_named: tuple[str, ...] = ()

    def refusal(self, raw: Raw) -> str:
        """The first option of config.json that the decoder does not compute; empty if it computes all."""
        return next((reason for check in self.refused if (reason := check(raw))), "")

    def layers(self, raw: Raw, path: Path) -> tuple[Layer, ...]:
        """From the first to the last. Raises UnsupportedModel for what is not computed."""
        return tuple(self._layer(raw, path, index) for index in range(self.count(raw, path)))

    def context(self, raw: Raw, path: Path) -> int:
        """Tokens of the longest text."""
        width = self._head_dim(raw, path) if self.latent is None else self.latent(raw, path).rope_dim
        ropes = self.rope.read(raw, path, width)
        whole = served_context(size(raw, "max_position_embeddings", path), raw, ropes, path)
        return whole if self.indexed is None else min(whole, size(raw, self.indexed, path))

    def extra_layers(self, raw: Raw, path: Path) -> int:
        """Behind the layers in the file, for predicting several tokens."""
        found = raw.get("num_nextn_predict_layers") or 0
        return size(raw, "num_nextn_predict_layers", path) if found and self.mixture is not None else 0

    def cap(self, raw: Raw, path: Path) -> float | None:
        """Of the logits."""
        return optional(raw, "final_logit_softcapping", path, self.logits_cap) if self.caps else None

    def ties(self, raw: Raw) -> bool:
        """Whether the head is the embedding."""
        return self.ties_by(raw, self.tied)

    def _layer(self, raw: Raw, path: Path, index: int) -> Layer:
        lone, norms = None if self.lone is None else self.lone(raw, path, index), self.norms
        residual = self.residual(raw, path)
        if lone == "mlp":
            norms = Norms(None, None, norms.mlp_input, norms.mlp_output)
            return Layer(None, self._mlp(raw, path, index), norms, residual)
        recurrent = None if self.recurrent is None else self.recurrent.read(raw, path, index)
        mixer: Mixer = recurrent or self._attention(raw, path, index)
        if lone == "mixer":
            return Layer(mixer, None, Norms(norms.mixer_input, norms.mixer_output, None, None), residual)
        return Layer(mixer, self._mlp(raw, path, index), norms, residual)

    def _mlp(self, raw: Raw, path: Path, index: int) -> FeedForward | Mixture:
        activation = self._activation(raw, path)
        if self.mixture is not None and not self.mixture.dense(raw, index):
            return self.mixture.read(raw, path, activation)
        return FeedForward(self.mlp_width(raw, path), activation, self.fused_gate_up, self.names.mlp)

    def _attention(self, raw: Raw, path: Path, index: int) -> Attention:
        if self.latent is not None:
            return self.latent(raw, path)
        heads = size(raw, "num_attention_heads", path)
        kv_heads = size(raw, "num_key_value_heads", path, heads)
        if heads % kv_heads:
            raise UnsupportedModel(f"{path}: {heads} heads do not divide over {kv_heads} key/value heads")
        head_dim = self._head_dim(raw, path)
        window = self.windows.read(raw, path, index)
        ropes = self.rope.read(raw, path, head_dim)
        scale = head_dim**-0.5 if self.attention_scale is None else self.attention_scale(raw, path)
        cap = optional(raw, "attn_logit_softcapping", path, self.attention_cap) if self.caps else None
        return SelfAttention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            scores=ScoreRule(scale, window, cap),
            rope=None if self.without_positions(raw, index) else ropes[FULL if window is None else SLIDING],
            qk_norm=self.qk_norm if self.qk_normed(raw) else None,
            qkv_bias=self.qkv_bias(raw),
            output_bias=self.output_bias(raw),
            fused=self.fused_qkv,
            gated=self.gated_attention,
            sinks=self.sinks,
            block=self.names.attention,
            output_name=self.names.output,
            norm_names=self.names.qk_norms,
        )

    def _head_dim(self, raw: Raw, path: Path) -> int:
        plain = size(raw, "hidden_size", path) // size(raw, "num_attention_heads", path)
        return size(raw, "head_dim", path, self.head_dim or plain)

    def _activation(self, raw: Raw, path: Path) -> Activation:
        name = raw.get(self.activation_field) or self.activation
        name = self.gelu if name == "gelu" else name
        if name not in self.activations:
            allowed = ", ".join(self.activations)
            raise UnsupportedModel(f"{path}: {self.activation_field} {name!r} is not supported; supported: {allowed}")
        return self.activations[name]

    @property
    def described(self) -> str:
        """What it has beside plain Llama, for docs/models.md."""
        parts = {
            "" if self.recurrent is None else self.recurrent.described: self.recurrent is not None,
            "gated attention": self.gated_attention,
            "attention with sinks": self.sinks,
            "latent attention": self.latent is not None,
            "texts up to the keys that an index chooses": self.indexed is not None,
            f"norms of q and k by {self.qk_norm}": self.qk_norm is not None,
            "norms after attention and MLP": self.norms.mixer_output is not None and self.norms.mixer_input is None,
            "norms before and after attention and MLP": self.norms.mixer_output is not None
            and self.norms.mixer_input is not None,
            "" if self.mixture is None else self.mixture.described: self.mixture is not None,
            "layers of a mixer or an MLP alone": self.lone is not None,
            "windows": self.windows != NO_WINDOWS,
            "layers without positions": self.without_positions not in (no_layer, every_layer),
            "no positions": self.without_positions is every_layer,
            "rotary positions of their own in layers with a window": self.rope.local_theta is not None,
            "part of a head rotated": self.rope.partial is not None,
            "neighbouring elements as pairs": self.rope.interleaved,
            "LongRoPE, up to the context before stretching": "longrope" in self.rope.scalings,
            "caps of scores and logits": self.caps,
            "GELU": self.activation.startswith("gelu"),
            "squared ReLU, without gates": self.activation == "relu2",
            "scaled embeddings": self.embedding is not one,
            "scaled scores": self.attention_scale is not None,
            "scaled layers and logits": self.residual is not one,
            "biases on q, k and v": self.qkv_bias is always,
            "biases on q, k and v by `attention_bias`": self.qkv_bias is by_default and self.output_bias is never,
            "biases on q, k, v and o by `attention_bias`": self.output_bias is not never and self.latent is None,
        }
        return "; ".join(part for part, has in parts.items() if has) or "nothing"

    @property
    def sites(self) -> tuple[str, ...]:
        """The linears of its layers that take LoRA, in the adapter's order."""
        plain_one = SelfAttention(1, 1, 1, ScoreRule(1.0), None, fused=self.fused_qkv, output_name=self.names.output)
        latent_one = LatentAttention(1, 1, 1, 1, 2, 1, ScoreRule(1.0), Rope(1.0, 2))
        attention = plain_one if self.latent is None else latent_one
        recurrent = () if self.recurrent is None else self.recurrent.like.linears(1)
        plain = FeedForward(1, fused=self.fused_gate_up, names=self.names.mlp)
        mlp: FeedForward | Mixture = plain
        if self.mixture is not None:
            shared = None if self.mixture.shared is None else plain
            latent = None if self.mixture.latent is None else 1
            mlp = Mixture(1, Routing(1, 1, renormalised=False), "silu", self.mixture.names, shared, latent)
        linears = (*attention.linears(1), *recurrent, *mlp.linears(1))
        return tuple(dict.fromkeys(linear.name for linear in linears))
