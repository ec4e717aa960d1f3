"""What follows a layer's mixer: an MLP, mostly a gated one, or a mixture of such. Loads no torch."""

from dataclasses import dataclass
from typing import Final, Literal

from knapper.engine.models.linear_shape import LinearShape, Shape


@dataclass(frozen=True)
class ClampedSwish:
    """g sigmoid(alpha g) (u + 1), of a gate g of at most `limit` and an up u between -limit and limit.

    Source: gpt-oss, arXiv 2508.10925, section 2, and transformers' `GptOssExperts._apply_gate`.
    """

    alpha: float
    limit: float


Activation = Literal["silu", "gelu_tanh", "relu2"] | ClampedSwish


MlpNames = tuple[str, str, str] | tuple[str, str]


def mlp_names(block: str) -> tuple[str, str, str]:
    """The modules of gate, up and down in a block of most architectures."""
    return f"{block}.gate_proj", f"{block}.up_proj", f"{block}.down_proj"


PLAIN_MLP: Final = mlp_names("mlp")


@dataclass(frozen=True)
class FeedForward:
    """down(activation(gate(x)) up(x)), arXiv 2002.05202. `fused`: the file has gate and up as one linear.

    `names`: the modules of gate, up and down; of up and down alone for down(activation(up(x))).
    """

    width: int
    activation: Activation = "silu"
    fused: bool = False
    names: MlpNames = PLAIN_MLP

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        """The linears that make gate and up, in this order, or up."""
        if self.fused:
            return (LinearShape("mlp.gate_up_proj", hidden, 2 * self.width, "mlp"),)
        return tuple(LinearShape(name, hidden, self.width, "mlp") for name in self.names[:-1])

    def output(self, hidden: int) -> LinearShape:
        return LinearShape(self.names[-1], self.width, hidden, "mlp")

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        return (*self.inputs(hidden), self.output(hidden))

    def routers(self, hidden: int) -> tuple[LinearShape, ...]:  # noqa: ARG002  of every kind of MLP
        return ()

    def corrections(self) -> dict[str, int]:
        return {}

    def joined(self, hidden: int) -> dict[str, Shape]:  # noqa: ARG002  of every kind of MLP
        return {}

    def numbers_of_row(self, hidden: int) -> int:  # noqa: ARG002  of every kind of MLP
        """Numbers that a row leaves for the backward pass."""
        return (4 if len(self.names) == 3 else 2) * self.width


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
    (arXiv 2412.19437, section 2.1.2). `scale` multiplies the weights. `biased`: the linear has a bias. `floor`: what is
    added to the sum that sigmoids are divided by.
    """

    experts: int
    active: int
    renormalised: bool
    groups: Groups | None = None
    scale: float = 1.0
    biased: bool = False
    floor: float = 1e-20


@dataclass(frozen=True)
class MixtureNames:
    """Within the layer: the router, the linears of an expert, {} for its number, what every row goes through, and the
    linear of its weight, if it has one. Without `gate` experts, and what is beside them, have up and down alone.
    `latent`: the linears before and behind the experts, where they compute in fewer numbers. `joined`: the tensors of
    all experts' gate and up, and of their down, in architectures of which files may have them so; `turned`: inputs
    before outputs. `whole`: they have them in no other way, gate and up as one linear whose outputs alternate, with
    biases, and so have adapters.
    """

    router: str = "mlp.gate"
    gate: str | None = "mlp.experts.{}.gate_proj"
    up: str = "mlp.experts.{}.up_proj"
    down: str = "mlp.experts.{}.down_proj"
    correction: str = "mlp.gate.e_score_correction_bias"
    shared: str = "mlp.shared_experts"
    shared_gate: str | None = None
    latent: tuple[str, str] | None = None
    joined: tuple[str, str] | None = None
    turned: bool = False
    whole: bool = False

    @property
    def of_shared(self) -> MlpNames:
        gate, up, down = mlp_names(self.shared)
        return (up, down) if self.gate is None else (gate, up, down)


PLAIN_EXPERTS: Final = MixtureNames()


@dataclass(frozen=True)
class Mixture:
    """MLPs of `width`, of which each row takes some, as `routing` says. Sources: arXiv 1701.06538, section 2.

    `shared`: one beside them that every row takes (arXiv 2401.06066, section 3.2); with a name for its gate, a frozen
    linear of one output, that one's sigmoid multiplies what it gives. `latent`: the numbers of a row that experts take
    and give (arXiv 2601.18089); None: the residual's.
    """

    width: int
    routing: Routing
    activation: Activation = "silu"
    names: MixtureNames = PLAIN_EXPERTS
    shared: FeedForward | None = None
    latent: int | None = None

    def inputs(self, hidden: int) -> tuple[LinearShape, ...]:
        """The experts' linears that make gate and up, in this order, or up."""
        if self.names.whole:
            return (self._whole(hidden, 2 * self.width, 0),)
        names = (self.names.up,) if self.names.gate is None else (self.names.gate, self.names.up)
        return tuple(self._of_experts(name, self.latent or hidden, self.width, 0) for name in names)

    def output(self, hidden: int) -> LinearShape:
        if self.names.whole:
            return self._whole(self.width, hidden, 1)
        return self._of_experts(self.names.down, self.width, self.latent or hidden, 1)

    def linears(self, hidden: int) -> tuple[LinearShape, ...]:
        """Those that take adapters: the router does not, in training as in the field."""
        shared = () if self.shared is None else self.shared.linears(hidden)
        return (*self.inputs(hidden), self.output(hidden), *shared, *self.latents(hidden))

    def latents(self, hidden: int) -> tuple[LinearShape, ...]:
        """The linears before and behind the experts."""
        if self.latent is None or self.names.latent is None:
            return ()
        before, behind = self.names.latent
        sizes = (before, hidden, self.latent), (behind, self.latent, hidden)
        return tuple(LinearShape(name, inputs, outputs, "mlp") for name, inputs, outputs in sizes)

    def router(self, hidden: int) -> LinearShape:
        return LinearShape(self.names.router, hidden, self.routing.experts, "mlp", self.routing.biased)

    def shared_gate(self, hidden: int) -> LinearShape | None:
        name = self.names.shared_gate
        return None if name is None or self.shared is None else LinearShape(name, hidden, 1, "mlp")

    def routers(self, hidden: int) -> tuple[LinearShape, ...]:
        """The frozen linears that weight the others' outputs."""
        gate = self.shared_gate(hidden)
        return (self.router(hidden), *(() if gate is None else (gate,)))

    def corrections(self) -> dict[str, int]:
        """Name and width of the vectors beside the router."""
        return {} if self.routing.groups is None else {self.names.correction: self.routing.experts}

    def numbers_of_row(self, hidden: int) -> int:
        """Numbers that a row leaves for the backward pass: of each of its experts, and of the router."""
        shared = 0 if self.shared is None else self.shared.numbers_of_row(hidden)
        shared += 0 if self.shared_gate(hidden) is None else hidden + 1  # what it weights, and the weight
        inner = 2 if self.names.gate is None else 4
        inner = 7 if isinstance(self.activation, ClampedSwish) else inner  # its gate and up before and after the clamps
        wide, latent = self.latent or hidden, 0 if self.latent is None else 2 * self.latent
        return self.routing.active * (inner * self.width + 2 * wide) + 2 * self.routing.experts + shared + latent

    def joined(self, hidden: int) -> dict[str, Shape]:
        """Name and shape of the tensors that have the linears of all experts, where files may have such."""
        if self.names.joined is None:
            return {}
        gate_up, down = self.names.joined
        experts, width = self.routing.experts, self.width
        if not self.names.whole:
            wide, both = self.latent or hidden, len(self.inputs(hidden)) * width
            if self.names.turned:
                return {gate_up: (experts, wide, both), down: (experts, width, wide)}
            return {gate_up: (experts, both, wide), down: (experts, wide, width)}
        biases = {f"{gate_up}_bias": (experts, 2 * width), f"{down}_bias": (experts, hidden)}
        return {gate_up: (experts, hidden, 2 * width), down: (experts, width, hidden), **biases}

    def _of_experts(self, module: str, inputs: int, outputs: int, place: int) -> LinearShape:
        joined = None if self.names.joined is None else self.names.joined[place]
        together = self.names.gate is None  # PEFT takes one by one those with gates only
        experts = self.routing.experts
        return LinearShape(module, inputs, outputs, "mlp", experts=experts, joined=joined, together=together)

    def _whole(self, inputs: int, outputs: int, place: int) -> LinearShape:
        assert self.names.joined is not None
        name, experts = self.names.joined[place], self.routing.experts
        return LinearShape(name, inputs, outputs, "mlp", biased=True, experts=experts, joined=name, whole=True)
