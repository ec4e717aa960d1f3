"""What a layer is made of: the facts from which its adapters' sites, its tensors and its memory follow. Loads no torch.

A layer is a mixer of rows and an MLP, each between norms. Today: `SelfAttention`; `GatedMlp` and `Mixture`. Another
kind is a class here that lists its linears, and its computation in `blocks`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from knapper.engine.models.rotary import Rope

Part = Literal["attention", "mlp", "unembed"]
Activation = Literal["silu", "gelu_tanh"]
QkNorm = Literal["head", "width"]


@dataclass(frozen=True)
class LinearShape:
    """A stored linear, (inputs) -> (outputs). `module`: its name within the layer, as files have it. `experts`: there
    are so many of one shape, and `module` has {} for an expert's number.
    """

    module: str
    inputs: int
    outputs: int
    part: Part
    biased: bool = False
    experts: int | None = None

    @property
    def name(self) -> str:
        return self.peft_target if self.experts is None else f"experts.{self.peft_target}"

    @property
    def peft_target(self) -> str:
        """Its short name in PEFT's target_modules."""
        return self.module.rpartition(".")[2]

    @property
    def modules(self) -> tuple[str, ...]:
        return expert_names(self.module, self.experts)


def expert_names(module: str, experts: int | None) -> tuple[str, ...]:
    """`module`, or the names of all experts by its pattern."""
    return (module,) if experts is None else tuple(module.format(expert) for expert in range(experts))


@dataclass(frozen=True)
class ScoreRule:
    """How keys are weighted: the softmax of `scale` q k, over the last `window` keys (the row's own is one; None: all).

    `cap`: s becomes cap tanh(s / cap) before the softmax. Source: Gemma 2, arXiv 2408.00118, section 2.
    """

    scale: float
    window: int | None = None
    cap: float | None = None


@dataclass(frozen=True)
class SelfAttention:
    """Causal attention. `rope`: None leaves queries and keys unrotated. `qk_norm`: an RMS norm of queries and keys
    before rotation, by head or over all heads at once. `fused`: the file has q, k and v as one linear, with one
    adapter.
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

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        """The linears that make queries, keys and values, in this order."""
        q, kv = self.q_width, self.kv_width
        widths = {"qkv_proj": q + 2 * kv} if self.fused else {"q_proj": q, "k_proj": kv, "v_proj": kv}
        return tuple(
            LinearShape(f"self_attn.{name}", hidden, width, "attention", self.qkv_bias)
            for name, width in widths.items()
        )

    def output(self, hidden: int) -> LinearShape:
        return LinearShape("self_attn.o_proj", self.q_width, hidden, "attention", self.output_bias)

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        """All, in the order of transformers' modules, which adapters keep: Phi-3's has the output first."""
        inputs, output = self.inputs(hidden), self.output(hidden)
        return (output, *inputs) if self.fused else (*inputs, output)

    def norms(self) -> dict[str, int]:
        """Name and width of the norms within it."""
        if self.qk_norm is None:
            return {}
        widths = (self.head_dim, self.head_dim) if self.qk_norm == "head" else (self.q_width, self.kv_width)
        return {"self_attn.q_norm": widths[0], "self_attn.k_norm": widths[1]}


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate(x)) up(x)), arXiv 2002.05202. `fused`: the file has gate and up as one linear. `block`: its
    name within the layer.
    """

    width: int
    activation: Activation = "silu"
    fused: bool = False
    block: str = "mlp"

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        """The linears that make gate and up, in this order."""
        widths = {"gate_up_proj": 2 * self.width} if self.fused else {"gate_proj": self.width, "up_proj": self.width}
        return tuple(LinearShape(f"{self.block}.{name}", hidden, width, "mlp") for name, width in widths.items())

    def output(self, hidden: int) -> LinearShape:
        return LinearShape(f"{self.block}.down_proj", self.width, hidden, "mlp")

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        return (*self.inputs(hidden), self.output(hidden))

    def routers(self, hidden: int) -> tuple[LinearShape, ...]:  # noqa: ARG002  of every kind of MLP
        return ()

    def corrections(self) -> dict[str, int]:
        return {}

    def numbers_of_row(self, hidden: int) -> int:  # noqa: ARG002  of every kind of MLP
        """Numbers that a row leaves for the backward pass."""
        return 4 * self.width


@dataclass(frozen=True)
class Groups:
    """Experts in `count` groups of equal size, of which a row takes its experts from the best `active`, by the sum of
    the best two scores of each.
    """

    count: int
    active: int


@dataclass(frozen=True)
class Routing:
    """A row's experts: the `active` likeliest by the softmax of a frozen linear over all `experts`.

    Their outputs are weighted by these probabilities; `renormalised`: divided by the sum of the chosen ones'. `groups`:
    the scores are sigmoids, and a frozen correction is added where experts are chosen, not where they are weighted
    (arXiv 2412.19437, section 2.1.2). `scale` multiplies the weights.
    """

    experts: int
    active: int
    renormalised: bool
    groups: Groups | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class MixtureNames:
    """Within the layer: the router, the linears of an expert, {} for its number, and what every row goes through."""

    router: str = "mlp.gate"
    gate: str = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"
    correction: str = "mlp.gate.e_score_correction_bias"
    shared: str = "mlp.shared_experts"


PLAIN_EXPERTS: Final = MixtureNames()


@dataclass(frozen=True)
class Mixture:
    """Gated MLPs of `width`, of which each row takes some, as `routing` says. Sources: arXiv 1701.06538, section 2.

    `shared`: one beside them that every row takes (arXiv 2401.06066, section 3.2).
    """

    width: int
    routing: Routing
    activation: Activation = "silu"
    names: MixtureNames = PLAIN_EXPERTS
    shared: GatedMlp | None = None

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        """The experts' linears that make gate and up, in this order."""
        return tuple(self._of_experts(name, hidden, self.width) for name in (self.names.gate, self.names.up))

    def output(self, hidden: int) -> LinearShape:
        return self._of_experts(self.names.down, self.width, hidden)

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        """Those that take adapters: the router does not, in training as in the field."""
        shared = () if self.shared is None else self.shared.linears(hidden)
        return (*self.inputs(hidden), self.output(hidden), *shared)

    def router(self, hidden: int) -> LinearShape:
        return LinearShape(self.names.router, hidden, self.routing.experts, "mlp")

    def routers(self, hidden: int) -> tuple[LinearShape, ...]:
        return (self.router(hidden),)

    def corrections(self) -> dict[str, int]:
        """Name and width of the vectors beside the router."""
        return {} if self.routing.groups is None else {self.names.correction: self.routing.experts}

    def numbers_of_row(self, hidden: int) -> int:
        """Numbers that a row leaves for the backward pass: of each of its experts, and of the router."""
        shared = 0 if self.shared is None else self.shared.numbers_of_row(hidden)
        return self.routing.active * (4 * self.width + 2 * hidden) + 2 * self.routing.experts + shared

    def _of_experts(self, module: str, inputs: int, outputs: int) -> LinearShape:
        return LinearShape(module, inputs, outputs, "mlp", experts=self.routing.experts)


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
    """x + r mixer(x), then x + r mlp(x), with `residual_scale` r."""

    mixer: SelfAttention
    mlp: GatedMlp | Mixture
    norms: Norms = PRE_NORMS
    residual_scale: float = 1.0

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        """Those that take adapters."""
        return (*self.mixer.linears(hidden), *self.mlp.linears(hidden))

    def stored(self, hidden: int) -> tuple[LinearShape, ...]:
        """All that the file has."""
        return (*self.linears(hidden), *self.mlp.routers(hidden))

    def norm_widths(self, hidden: int) -> dict[str, int]:
        return {**dict.fromkeys(self.norms, hidden), **self.mixer.norms()}
