"""What an architecture says of its mixtures of experts: where config.json has their sizes, and which layers have one.

Loads no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from knapper import limits
from knapper.engine.models.fields import Raw, UnsupportedModel, number, size
from knapper.engine.models.mlp import (
    PLAIN_EXPERTS,
    Activation,
    FeedForward,
    Groups,
    Mixture,
    MixtureNames,
    Routing,
)
from knapper.errors import UserError

Bias = Callable[[Raw], bool]
Layers = Callable[[Raw, int], bool]  # whether it holds for a layer, by its number
Width = Callable[[Raw, Path, int], int]  # of an expert's width


def never(raw: Raw) -> bool:  # noqa: ARG001  one of the rules for a bias
    return False


def always(raw: Raw) -> bool:  # noqa: ARG001  one of the rules for a bias
    return True


def no_layer(raw: Raw, index: int) -> bool:  # noqa: ARG001  one of the rules for layers
    return False


def every_layer(raw: Raw, index: int) -> bool:  # noqa: ARG001  one of the rules for layers
    return True


def by_count(raw: Raw, path: Path, width: int) -> int:
    """Of so many experts that every row takes."""
    return width * size(raw, "n_shared_experts", path, 1)


def by_field(name: str) -> Width:
    return lambda raw, path, width: size(raw, name, path)  # noqa: ARG005  the file says it, whatever the experts have


# An architecture's own name, or transformers' for all.
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class MixtureRule:
    """Where config.json has a mixture's sizes, and which layers have one.

    `width`: the field of an expert's inner size. `renormalised`: whether the weights of a row's experts are divided by
    their sum, to which `floor` is added. `corrected`: experts are chosen by sigmoids with a correction, of groups where
    there are several. `shared`: the inner size of what every row goes through beside its experts; None: nothing.
    `latent`: the field of the numbers that experts take, where it has one. `biased`: router and experts have biases.
    `dense`: layers with a plain MLP. `activation`: of experts, where it is not that of the MLPs.
    """

    renormalised: Bias
    corrected: bool = False
    floor: float = 1e-20
    biased: bool = False
    width: str = "moe_intermediate_size"
    shared: Width | None = None
    latent: str | None = None
    dense: Layers = no_layer
    names: MixtureNames = PLAIN_EXPERTS
    activation: Callable[[Raw, Path], Activation] | None = None

    def read(self, raw: Raw, path: Path, activation: Activation) -> Mixture:
        name = next((field for field in _EXPERTS if field in raw), _EXPERTS[0])
        experts, active = size(raw, name, path), size(raw, "num_experts_per_tok", path)
        if experts > limits.model_experts_max:
            raise UserError(f"{path}: {name} is {experts}; allowed: at most {limits.model_experts_max}")
        if active > experts:
            raise UnsupportedModel(f"{path}: num_experts_per_tok is {active}, and there are {experts} experts")
        width = size(raw, self.width, path)
        activation = activation if self.activation is None else self.activation(raw, path)
        wide = None if self.shared is None else self.shared(raw, path, width)
        shared = None if wide is None else FeedForward(wide, activation, names=self.names.of_shared)
        routing = self._routing(raw, path, experts, active)
        return Mixture(width, routing, activation, self.names, shared, self._latent(raw, path))

    def _latent(self, raw: Raw, path: Path) -> int | None:
        given = self.latent is not None and raw.get(self.latent) is not None
        return size(raw, self.latent, path) if self.latent is not None and given else None

    def _routing(self, raw: Raw, path: Path, experts: int, active: int) -> Routing:
        if not self.corrected:
            return Routing(experts, active, self.renormalised(raw), biased=self.biased)
        groups = Groups(size(raw, "n_group", path, 1), size(raw, "topk_group", path, 1))
        if experts % groups.count or experts // groups.count < 2 or groups.active > groups.count:
            raise UnsupportedModel(
                f"{path}: n_group is {groups.count}, and topk_group {groups.active}, of {experts} experts"
            )
        if active > experts // groups.count * groups.active:
            raise UnsupportedModel(f"{path}: num_experts_per_tok is {active}, more than are in {groups.active} groups")
        scale = number(raw, "routed_scaling_factor", path, 1.0)
        return Routing(experts, active, self.renormalised(raw), groups, scale, floor=self.floor)

    @property
    def described(self) -> str:
        """For docs/models.md."""
        if self.biased:
            return "experts with biases and clamped activations"
        chosen = ", chosen by corrected scores and by groups" if self.corrected else ""
        return f"experts{chosen}{'' if self.shared is None else ', beside a shared one'}"
