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
    GatedMlp,
    Groups,
    Mixture,
    MixtureNames,
    Routing,
    mlp_names,
)
from knapper.errors import UserError

Bias = Callable[[Raw], bool]
Layers = Callable[[Raw, int], bool]  # whether it holds for a layer, by its number


def never(raw: Raw) -> bool:  # noqa: ARG001  one of the rules for a bias
    return False


def always(raw: Raw) -> bool:  # noqa: ARG001  one of the rules for a bias
    return True


def no_layer(raw: Raw, index: int) -> bool:  # noqa: ARG001  one of the rules for layers
    return False


def every_layer(raw: Raw, index: int) -> bool:  # noqa: ARG001  one of the rules for layers
    return True


# An architecture's own name, or transformers' for all.
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class MixtureRule:
    """Where config.json has a mixture's sizes, and which layers have one.

    `width`: the field of an expert's inner size. `renormalised`: whether the weights of a row's experts are divided by
    their sum. `grouped`: experts are chosen by groups, and each row takes shared ones too. `shared_width`: the field of
    the inner size of a shared one, without groups. `biased`: router and experts have biases. `dense`: layers with a
    plain MLP. `activation`: of experts, where it is not that of the MLPs.
    """

    renormalised: Bias
    grouped: bool = False
    biased: bool = False
    width: str = "moe_intermediate_size"
    shared_width: str | None = None
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
        if not self.grouped:
            routing = Routing(experts, active, self.renormalised(raw), biased=self.biased)
            field = self.shared_width
            wide = None if field is None else GatedMlp(size(raw, field, path), activation, names=self._shared_names)
            return Mixture(width, routing, activation, self.names, wide)
        groups = Groups(size(raw, "n_group", path, 1), size(raw, "topk_group", path, 1))
        if experts % groups.count or experts // groups.count < 2 or groups.active > groups.count:
            raise UnsupportedModel(
                f"{path}: n_group is {groups.count}, and topk_group {groups.active}, of {experts} experts"
            )
        if active > experts // groups.count * groups.active:
            raise UnsupportedModel(f"{path}: num_experts_per_tok is {active}, more than are in {groups.active} groups")
        scale = number(raw, "routed_scaling_factor", path, 1.0)
        shared = GatedMlp(width * size(raw, "n_shared_experts", path, 1), activation, names=self._shared_names)
        routing = Routing(experts, active, self.renormalised(raw), groups, scale)
        return Mixture(width, routing, activation, self.names, shared)

    @property
    def has_shared(self) -> bool:
        return self.grouped or self.shared_width is not None

    @property
    def _shared_names(self) -> tuple[str, str, str]:
        return mlp_names(self.names.shared)
