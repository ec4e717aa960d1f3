"""The losses as Tinker's documentation has them, of the log-probabilities that a server returns.

One datum of N tokens: p the learner's log-probabilities, q the sampler's. Each loss is a sum over tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]  # by the names of loss_fn_inputs, each (N)


@dataclass(frozen=True)
class LossFormula:
    """`terms`: the loss of each token, (N). `config`: what is sent with the request."""

    name: str
    terms: Callable[[Tensor, Inputs], Tensor]
    config: Mapping[str, float]


def _cross_entropy(p: Tensor, given: Inputs) -> Tensor:
    return -given["weights"] * p


def _importance_sampling(p: Tensor, given: Inputs) -> Tensor:
    return -torch.exp(p - given["logprobs"]) * given["advantages"]


def _ppo(p: Tensor, given: Inputs) -> Tensor:
    ratio, advantages = torch.exp(p - given["logprobs"]), given["advantages"]
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def _cispo(p: Tensor, given: Inputs) -> Tensor:
    ratio = torch.exp(p - given["logprobs"]).detach()
    return -ratio.clamp(0.8, 1.2) * p * given["advantages"]


def _dro(p: Tensor, given: Inputs) -> Tensor:
    return -p * given["advantages"] + 0.5 * 0.05 * (p - given["logprobs"]) ** 2


_CLIPS: Final = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
LOSSES: Final = (
    LossFormula("cross_entropy", _cross_entropy, {}),
    LossFormula("importance_sampling", _importance_sampling, {}),
    LossFormula("ppo", _ppo, _CLIPS),
    LossFormula("cispo", _cispo, _CLIPS),
    LossFormula("dro", _dro, {"beta": 0.05}),
)


def inputs_of(datum: Any) -> dict[str, Tensor]:
    """The numbers of a datum, as the formulas take them."""
    return {name: data.to_torch().to(torch.float64) for name, data in datum.loss_fn_inputs.items()}
