"""What a layer is made of: the facts from which its adapters' sites, its tensors and its memory follow. Loads no torch.

A layer is a mixer of rows and an MLP (`mlp`), or one of them, each between norms. Mixers: `SelfAttention`,
`LatentAttention`, and those of `recurrent`. Another kind is a class that lists its linears, and its computation in
`blocks`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from knapper.engine.models.linear_shape import LinearShape, Shape
from knapper.engine.models.mlp import FeedForward, Mixture
from knapper.engine.models.recurrent import Mamba2, Recurrent
from knapper.engine.models.rotary import Rope

if TYPE_CHECKING:
    from torch import Tensor

QkNorm = Literal["head", "width"]


@dataclass(frozen=True)
class AttentionLayout:
    """How the products of exact attention are made: of a multiple of `rows` rows, and of at most `part` columns and
    summands at a time (0: all). Which one keeps a row's bits in every company is tried on each CPU.
    """

    rows: int = 8
    part: int = 0

    def __str__(self) -> str:
        return f"rows in multiples of {self.rows}" + (f", {self.part} columns and summands at a time" * bool(self.part))


@dataclass(frozen=True)
class ScoreRule:
    """How keys are weighted: the softmax of `scale` q k, over the last `window` keys (the row's own is one; None: all).

    `cap`: s becomes cap tanh(s / cap) before the softmax. Source: Gemma 2, arXiv 2408.00118, section 2.
    `sinks_H`: a score of each head, float32, that takes its part of the softmax and has no value; None until the
    weights are loaded, and in layers without `SelfAttention.sinks`. Source: arXiv 2309.17453, section 3.3.
    `layout`: the one for this CPU, once the weights are loaded.
    """

    scale: float
    window: int | None = None
    cap: float | None = None
    sinks_H: "Tensor | None" = field(default=None, compare=False, repr=False)
    layout: AttentionLayout = field(default=AttentionLayout(), compare=False, repr=False)


@dataclass(frozen=True)
class SelfAttention:
    """Causal attention. `rope`: None leaves queries and keys unrotated. `qk_norm`: an RMS norm of queries and keys
    before rotation, by head or over all heads at once. `fused`: the file has q, k and v as one linear, with one
    adapter. `gated`: beside its queries each head has a gate, whose sigmoid multiplies its output. `sinks`: each head
    has a frozen score beside those of its keys. `block`, `output_name`, `norm_names`: the modules of all of it,
    of the output and of the norms.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scores: ScoreRule
    rope: Rope | None
    qk_norm: QkNorm | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    fused: bool = False
    gated: bool = False
    sinks: bool = False
    block: str = "self_attn"
    output_name: str = "o_proj"
    norm_names: tuple[str, str] = ("q_norm", "k_norm")

    @property
    def state_shapes(self) -> tuple[Shape, ...]:
        """None: it keeps keys and values of all tokens."""
        return ()

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        """The linears that make queries, keys and values, in this order."""
        q, kv = self.q_width, self.kv_width
        queries = 2 * q if self.gated else q
        widths = {"qkv_proj": q + 2 * kv} if self.fused else {"q_proj": queries, "k_proj": kv, "v_proj": kv}
        return tuple(
            LinearShape(f"{self.block}.{name}", hidden, width, "attention", self.qkv_bias)
            for name, width in widths.items()
        )

    def output(self, hidden: int) -> LinearShape:
        return LinearShape(f"{self.block}.{self.output_name}", self.q_width, hidden, "attention", self.output_bias)

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        """All, in the order of transformers' modules, which adapters keep: Phi-3's has the output first."""
        inputs, output = self.inputs(hidden), self.output(hidden)
        return (output, *inputs) if self.fused else (*inputs, output)

    def norms(self) -> dict[str, int]:
        """Name and width of the norms within it."""
        if self.qk_norm is None:
            return {}
        widths = (self.head_dim, self.head_dim) if self.qk_norm == "head" else (self.q_width, self.kv_width)
        return {f"{self.block}.{name}": width for name, width in zip(self.norm_names, widths, strict=True)}

    def tensors(self, hidden: int) -> Mapping[str, Shape]:  # noqa: ARG002  as of other mixers
        """Name and shape of what is neither a linear nor a norm."""
        return {f"{self.block}.sinks": (self.heads,)} if self.sinks else {}

    def numbers_of_row(self, hidden: int) -> int:
        """Numbers that a row leaves for the backward pass, beside most of those of the residual's width."""
        return (5 if self.gated else 2) * self.q_width + 2 * self.kv_width + hidden


@dataclass(frozen=True)
class LatentAttention:
    """Causal attention whose queries, keys and values come through narrow layers (MLA): arXiv 2405.04434, section 2.1.

    Of a head's queries and keys `plain_dim` elements are not rotated; the other `rope_dim` of a key are one for all
    heads. `q_rank`: None: queries come of the residual itself. Keys and values are kept as wide as they are computed
    with, values and keys equally wide: what one lacks is zeros. `biased`: the linears of the residual and the output.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    scores: ScoreRule
    rope: Rope
    biased: bool = False
    sinks: bool = False

    @property
    def state_shapes(self) -> tuple[Shape, ...]:
        return ()

    @property
    def kv_heads(self) -> int:
        return self.heads

    @property
    def head_dim(self) -> int:
        """Of keys and values as they are kept."""
        return max(self.plain_dim + self.rope_dim, self.value_dim)

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        """The linears of the residual: queries or what they come of, then what keys and values come of."""
        queries = ("q_proj", self.q_width) if self.q_rank is None else ("q_a_proj", self.q_rank)
        latents = "kv_a_proj_with_mqa", self.kv_rank + self.rope_dim
        return tuple(_latent(name, hidden, width, self.biased) for name, width in (queries, latents))

    def queries(self) -> LinearShape | None:
        return None if self.q_rank is None else _latent("q_b_proj", self.q_rank, self.q_width)

    def keys_and_values(self) -> LinearShape:
        return _latent("kv_b_proj", self.kv_rank, self.heads * (self.plain_dim + self.value_dim))

    def output(self, hidden: int) -> LinearShape:
        return _latent("o_proj", self.heads * self.value_dim, hidden, self.biased)

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        """All, in the order of transformers' modules."""
        (first, latents), queries = self.inputs(hidden), self.queries()
        inner = () if queries is None else (queries,)
        return (first, *inner, latents, self.keys_and_values(), self.output(hidden))

    def norms(self) -> dict[str, int]:
        of_queries = {} if self.q_rank is None else {"self_attn.q_a_layernorm": self.q_rank}
        return {**of_queries, "self_attn.kv_a_layernorm": self.kv_rank}

    def tensors(self, hidden: int) -> Mapping[str, Shape]:  # noqa: ARG002  as of other mixers
        return {}

    def numbers_of_row(self, hidden: int) -> int:
        latents = (self.q_rank or 0) + self.kv_rank
        return 4 * self.heads * self.head_dim + self.heads * self.value_dim + 4 * latents + hidden

    @property
    def q_width(self) -> int:
        return self.heads * (self.plain_dim + self.rope_dim)

    @property
    def kv_width(self) -> int:
        return self.heads * self.head_dim


def _latent(name: str, inputs: int, outputs: int, biased: bool = False) -> LinearShape:
    return LinearShape(f"self_attn.{name}", inputs, outputs, "attention", biased)


Attention = SelfAttention | LatentAttention  # the mixers that keep keys and values
Mixer = Attention | Recurrent
Mlp = FeedForward | Mixture


@dataclass(frozen=True)
class Norms:
    """Names of a layer's norms, of the input and of the output of its mixer and its MLP; None where there is none."""

    mixer_input: str | None
    mixer_output: str | None
    mlp_input: str | None
    mlp_output: str | None

    def __iter__(self) -> Iterator[str]:
        names = (self.mixer_input, self.mixer_output, self.mlp_input, self.mlp_output)
        return (name for name in names if name is not None)


PRE_NORMS: Final = Norms("input_layernorm", None, "post_attention_layernorm", None)


@dataclass(frozen=True)
class Layer:
    """x + r mixer(x), then x + r mlp(x), with `residual_scale` r; or the one of them that it has."""

    mixer: Mixer | None
    mlp: Mlp | None
    norms: Norms = PRE_NORMS
    residual_scale: float = 1.0

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        """Those that take adapters."""
        return tuple(linear for part in self.parts for linear in part.linears(hidden))

    def stored(self, hidden: int) -> tuple[LinearShape, ...]:
        """All that the file has."""
        frozen = (self.mixer.output(hidden),) if isinstance(self.mixer, Mamba2) else ()
        return (*self.linears(hidden), *frozen, *(() if self.mlp is None else self.mlp.routers(hidden)))

    def norm_widths(self, hidden: int) -> dict[str, int]:
        return {**dict.fromkeys(self.norms, hidden), **({} if self.mixer is None else self.mixer.norms())}

    def tensors(self, hidden: int) -> dict[str, Shape]:
        """Name and shape of what is neither a linear nor a norm."""
        mixed = {} if self.mixer is None else self.mixer.tensors(hidden)
        corrections = {} if self.mlp is None else self.mlp.corrections()
        return {**mixed, **{name: (width,) for name, width in corrections.items()}}

    def joined(self, hidden: int) -> dict[str, Shape]:
        """Name and shape of the tensors that have the linears of all experts, where files may have such."""
        return {} if self.mlp is None else self.mlp.joined(hidden)

    def numbers_of_row(self, hidden: int) -> int:
        """Numbers that a row leaves for the backward pass, beside those of the residual's width."""
        return sum(part.numbers_of_row(hidden) for part in self.parts)

    @property
    def parts(self) -> tuple[Mixer | Mlp, ...]:
        return tuple(part for part in (self.mixer, self.mlp) if part is not None)

    @property
    def state_numbers(self) -> int:
        """float32 numbers that a sequence keeps in it, however long it is."""
        return 0 if self.mixer is None else sum(math.prod(shape) for shape in self.mixer.state_shapes)
