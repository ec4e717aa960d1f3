"""Losses: pure functions of one datum's float32 log-probabilities. Summed over tokens, never averaged.

T tokens, K targets of a position. `learner_T` are the log-probabilities of the targets under the weights being trained;
every other argument has the name and the meaning that it has in a request. Where a formula has no published default,
ours stands beside it with its reason.

Every metric is a sum over tokens, so that it stays exact when a client splits its batch over requests: divide by
`tokens:sum` for a mean.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.errors import InvalidField, UserError

Metrics = dict[str, Tensor]  # `name:sum` -> a scalar
Formula = Callable[..., tuple[Tensor, Metrics]]
Threshold = float | Tensor  # one for all tokens (config), or one a token (input)


def cross_entropy(learner_T: Tensor, *, weights: Tensor) -> tuple[Tensor, Metrics]:
    """-sum(weights * learner). Both (T), or both (T, K). Weights may be negative: forward_backward_custom sends
    -dC/dlogprobs.
    """
    return -(weights * learner_T).sum(), {"tokens:sum": _count(weights != 0), "weights:sum": weights.sum()}


def importance_sampling(learner_T: Tensor, *, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
    """-sum(ratio * advantages), ratio = exp(learner - sampler)."""
    ratio_T = torch.exp(learner_T - logprobs)
    return -(ratio_T * advantages).sum(), _off_policy(learner_T, logprobs, ratio_T, advantages != 0)


def ppo(
    learner_T: Tensor,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: Threshold = 0.8,
    clip_high_threshold: Threshold = 1.2,
) -> tuple[Tensor, Metrics]:
    """-sum(min(ratio * advantages, clip(ratio) * advantages)); thresholds are ratios, not distances from 1."""
    ratio_T = torch.exp(learner_T - logprobs)
    return _clipped(learner_T, logprobs, advantages, ratio_T, clip_low_threshold, clip_high_threshold)


def cispo(
    learner_T: Tensor,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: Threshold = 0.0,
    clip_high_threshold: Threshold = 4.0,
) -> tuple[Tensor, Metrics]:
    """-sum(stop_gradient(clip(ratio)) * learner * advantages)."""
    ratio_T = torch.exp(learner_T - logprobs).detach()
    clipped_T = _clip(ratio_T, clip_low_threshold, clip_high_threshold)
    trained_T = advantages != 0
    metrics = _off_policy(learner_T, logprobs, ratio_T, trained_T)
    metrics["clipped:sum"] = _count((clipped_T != ratio_T) & trained_T)
    return -(clipped_T * learner_T * advantages).sum(), metrics


def dro(learner_T: Tensor, *, logprobs: Tensor, advantages: Tensor, beta: float = 0.05) -> tuple[Tensor, Metrics]:
    """-sum(learner * advantages - beta/2 * (learner - sampler)^2), over all tokens, those of zero advantage too.

    `beta` has no published default; 0.05 is the value of the published example.
    """
    distance_T = learner_T - logprobs
    value_T = learner_T * advantages - 0.5 * beta * distance_T**2
    every_T = torch.ones_like(advantages, dtype=torch.bool)
    return -value_T.sum(), _off_policy(learner_T, logprobs, torch.exp(distance_T), every_T)


def gspo(
    learner_T: Tensor,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    sequence_ratio_mask: Tensor,
    clip_low_threshold: Threshold,
    clip_high_threshold: Threshold,
) -> tuple[Tensor, Metrics]:
    """PPO's sum with one ratio a sequence: s = exp(mean over the mask of (learner - sampler)), each token's gradient
    through s * exp(learner - stop_gradient(learner)).

    The mask is 0 or 1 a token, with at least one 1. The thresholds have no published default, and ours would be a
    guess, so they must be given.
    """
    fixed_T = learner_T.detach()
    sequence = torch.exp(((fixed_T - logprobs) * sequence_ratio_mask).sum() / sequence_ratio_mask.sum())
    ratio_T = sequence * torch.exp(learner_T - fixed_T)
    return _clipped(learner_T, logprobs, advantages, ratio_T, clip_low_threshold, clip_high_threshold)


def _clipped(
    learner_T: Tensor, logprobs: Tensor, advantages: Tensor, ratio_T: Tensor, low: Threshold, high: Threshold
) -> tuple[Tensor, Metrics]:
    plain_T, clipped_T = ratio_T * advantages, _clip(ratio_T, low, high) * advantages
    metrics = _off_policy(learner_T, logprobs, ratio_T, advantages != 0)
    metrics["clipped:sum"] = _count(clipped_T < plain_T)
    return -torch.minimum(plain_T, clipped_T).sum(), metrics


def _clip(ratio_T: Tensor, low: Threshold, high: Threshold) -> Tensor:
    def each(bound: Threshold) -> Tensor:
        return torch.as_tensor(bound, dtype=ratio_T.dtype, device=ratio_T.device).expand_as(ratio_T)

    return torch.clamp(ratio_T, each(low), each(high))


def _off_policy(learner_T: Tensor, sampler_T: Tensor, ratio_T: Tensor, trained_T: Tensor) -> Metrics:
    """How far the learner is from the sampler: `kl:sum` estimates KL(sampler, learner) by the sampled tokens, k =
    sampler - learner.
    """
    return {
        "tokens:sum": _count(trained_T),
        # By `where`: a mask as an index would make the device tell how many there are.
        "ratio:sum": torch.where(trained_T, ratio_T.detach(), 0.0).sum(),
        "kl:sum": torch.where(trained_T, sampler_T - learner_T.detach(), 0.0).sum(),
    }


def _count(mask: Tensor) -> Tensor:
    return mask.sum(dtype=torch.float32)


@dataclass(frozen=True)
class Loss:
    """A formula and what a request must and may give it.

    `silent`: the input whose zeros make a token's gradient zero, whatever the weights; empty if there is none.
    """

    name: str
    formula: Formula
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    silent: str = ""
    columns: bool = False  # (T, K) targets allowed

    def needs_gradient(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """(T), False where no gradient can arise."""
        if not self.silent:
            return np.ones(len(inputs["target_tokens"]), dtype=bool)
        needed: NDArray[np.bool_] = inputs[self.silent] != 0
        return np.asarray(needed.any(axis=1)) if needed.ndim == 2 else needed

    def read_config(self, config: Mapping[str, float | str]) -> dict[str, float]:
        """The config, checked. Raises InvalidField."""
        values: dict[str, float] = {}
        for key, value in config.items():
            field = f"loss_fn_config[{key!r}]"
            if key not in self.config:
                allowed = ", ".join(self.config) or "no keys"
                raise InvalidField(field, value, f"the loss {self.name} takes {allowed}")
            if isinstance(value, str) or not math.isfinite(value) or value < 0:
                raise InvalidField(field, value, "a finite number, 0 or more")
            values[key] = float(value)
        return values

    def default(self, key: str) -> float | None:
        """The value of a config key that the request leaves out; None: it must be given, by config or as an input."""
        found = inspect.signature(self.formula).parameters[key].default
        return None if found is inspect.Parameter.empty else float(found)

    def __call__(
        self, learner_T: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]
    ) -> tuple[Tensor, Metrics]:
        """(the sum, metrics with `loss:sum` among them)."""
        loss, metrics = self.formula(learner_T, **inputs, **config)
        return loss, {"loss:sum": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}


_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")
_SAMPLED = ("target_tokens", "logprobs", "advantages")

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", cross_entropy, ("target_tokens", "weights"), silent="weights", columns=True),
        Loss("importance_sampling", importance_sampling, _SAMPLED, silent="advantages"),
        Loss("ppo", ppo, _SAMPLED, _THRESHOLDS, _THRESHOLDS, silent="advantages"),
        Loss("cispo", cispo, _SAMPLED, _THRESHOLDS, _THRESHOLDS, silent="advantages"),
        Loss("dro", dro, _SAMPLED, config=("beta",)),
        Loss("gspo", gspo, (*_SAMPLED, "sequence_ratio_mask"), _THRESHOLDS, _THRESHOLDS, silent="advantages"),
    )
}


def find(name: str) -> Loss:
    """The loss. Raises InvalidField, or UserError for one that Tinker has and knapper cannot have."""
    if name == "stable_reinforce":
        raise UserError(
            "loss_fn is 'stable_reinforce', whose formula is not published, so knapper cannot compute it; "
            "pass importance_sampling, ppo or cispo instead"
        )
    if name == "custom":
        raise UserError(
            "loss_fn is 'custom', a loss computed on the server, which knapper does not do; "
            "use forward_backward_custom, which computes your loss on the client"
        )
    if name not in LOSSES:
        raise InvalidField("loss_fn", name, ", ".join(LOSSES))
    return LOSSES[name]
