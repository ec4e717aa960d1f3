"""Losses: pure functions of one datum's float32 log-probabilities. Summed over tokens, never averaged.

T tokens, K targets of a position. `learner_T` are the log-probabilities of the targets under the weights being trained;
every other argument has the name and the meaning that it has in a request. Where a formula has no published default,
ours stands beside it with its reason.

Each formula names its source: the protocol's page, below https://tinker-docs.thinkingmachines.ai/tinker/losses, and the
paper that it comes from.

A formula gives a term for each token. The loss is the sum of the terms, each multiplied by its weight where a datum has
`weights`: 1 changes nothing, and 0 takes a token out of the gradient and the metrics.

Every metric is a sum over tokens, so that it stays exact when a client splits its batch over requests: divide by
`tokens:sum` for a mean.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.errors import InvalidField, UserError

ByToken = dict[str, Tensor]  # name -> a value of each token, whose sum over the trained tokens is the metric `name:sum`
Formula = Callable[..., tuple[Tensor, ByToken]]  # (terms, metrics), each in the shape of `learner_T`
Threshold = float | Tensor  # one for all tokens (config), or one a token (input)


def cross_entropy(learner_T: Tensor) -> tuple[Tensor, ByToken]:
    """-learner, (T) or (T, K). Its weights may be negative: forward_backward_custom sends -dC/dlogprobs.

    Source: the protocol's page, "Cross-Entropy"; the negative log-likelihood of the targets.
    """
    return -learner_T, {}


def importance_sampling(learner_T: Tensor, *, logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, ByToken]:
    """-ratio * advantages, ratio = exp(learner - sampler).

    Source: the protocol's page, "Importance Sampling"; REINFORCE (Williams 1992) off policy, the unclipped objective
    of arXiv 1707.06347, equation 6.
    """
    ratio_T = torch.exp(learner_T - logprobs)
    return -(ratio_T * advantages), _off_policy(learner_T, logprobs, ratio_T)


def ppo(
    learner_T: Tensor,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: Threshold = 0.8,
    clip_high_threshold: Threshold = 1.2,
) -> tuple[Tensor, ByToken]:
    """-min(ratio * advantages, clip(ratio) * advantages); thresholds are ratios, not distances from 1.

    Source: the protocol's page, "PPO"; arXiv 1707.06347, equation 7.
    """
    ratio_T = torch.exp(learner_T - logprobs)
    return _clipped(learner_T, logprobs, advantages, ratio_T, clip_low_threshold, clip_high_threshold)


def cispo(
    learner_T: Tensor,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    clip_low_threshold: Threshold = 0.0,
    clip_high_threshold: Threshold = 4.0,
) -> tuple[Tensor, ByToken]:
    """-stop_gradient(clip(ratio)) * learner * advantages.

    Source: the protocol's page, "CISPO"; arXiv 2506.13585 (MiniMax-M1).
    """
    ratio_T = torch.exp(learner_T - logprobs).detach()
    clipped_T = _clip(ratio_T, clip_low_threshold, clip_high_threshold)
    metrics = _off_policy(learner_T, logprobs, ratio_T) | {"clipped": clipped_T != ratio_T}
    return -(clipped_T * learner_T * advantages), metrics


def dro(learner_T: Tensor, *, logprobs: Tensor, advantages: Tensor, beta: float = 0.05) -> tuple[Tensor, ByToken]:
    """-(learner * advantages - beta/2 * (learner - sampler)^2), of all tokens, those of zero advantage too.

    `beta` has no published default; 0.05 is the value of the published example.

    Source: the protocol's page, "DRO"; arXiv 2405.19107 and 2501.12599, with the client's (soft) advantages.
    """
    distance_T = learner_T - logprobs
    value_T = learner_T * advantages - 0.5 * beta * distance_T**2
    return -value_T, _off_policy(learner_T, logprobs, torch.exp(distance_T))


def gspo(
    learner_T: Tensor,
    *,
    logprobs: Tensor,
    advantages: Tensor,
    sequence_ratio_mask: Tensor,
    clip_low_threshold: Threshold,
    clip_high_threshold: Threshold,
) -> tuple[Tensor, ByToken]:
    """PPO's terms with one ratio a sequence: s = exp(mean over the mask of (learner - sampler)), each token's gradient
    through s * exp(learner - stop_gradient(learner)).

    The mask is 0 or 1 a token, with at least one 1. The thresholds have no published default, and ours would be a
    guess, so they must be given.

    Source: arXiv 2507.18071 (GSPO; for a token's gradient its variant GSPO-token). The names of the inputs are the
    SDK's.
    """
    fixed_T = learner_T.detach()
    sequence = torch.exp(((fixed_T - logprobs) * sequence_ratio_mask).sum() / sequence_ratio_mask.sum())
    ratio_T = sequence * torch.exp(learner_T - fixed_T)
    return _clipped(learner_T, logprobs, advantages, ratio_T, clip_low_threshold, clip_high_threshold)


def _clipped(
    learner_T: Tensor, logprobs: Tensor, advantages: Tensor, ratio_T: Tensor, low: Threshold, high: Threshold
) -> tuple[Tensor, ByToken]:
    plain_T, clipped_T = ratio_T * advantages, _clip(ratio_T, low, high) * advantages
    metrics = _off_policy(learner_T, logprobs, ratio_T) | {"clipped": clipped_T < plain_T}
    return -torch.minimum(plain_T, clipped_T), metrics


def _clip(ratio_T: Tensor, low: Threshold, high: Threshold) -> Tensor:
    def expanded(bound: Threshold) -> Tensor:
        tensor = bound if isinstance(bound, Tensor) else ratio_T.new_full((), bound)
        return tensor.to(ratio_T.dtype).expand_as(ratio_T)

    return torch.clamp(ratio_T, expanded(low), expanded(high))


def _off_policy(learner_T: Tensor, sampler_T: Tensor, ratio_T: Tensor) -> ByToken:
    """How far the learner is from the sampler: `kl` estimates KL(sampler, learner) by the sampled tokens, k =
    sampler - learner.

    Source: the estimator k1 of J. Schulman, http://joschu.net/blog/kl-approx.html.
    """
    return {"ratio": ratio_T, "kl": sampler_T - learner_T}


class LossValue(NamedTuple):
    """The loss of one datum. `terms` is in the shape of its targets; their sum `total` alone carries a gradient."""

    total: Tensor
    metrics: dict[str, Tensor]  # `name:sum` -> a scalar; `loss:sum` is the total
    terms: Tensor


@dataclass(frozen=True)
class Loss:
    """A formula, and the inputs and config that a request must or may give.

    `silent`: inputs whose zeros make a token's gradient zero, whatever the model's weights.
    """

    name: str
    formula: Formula
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    silent: tuple[str, ...] = ("weights", "advantages")
    columns: bool = False  # (T, K) targets allowed
    returns_terms: bool = False  # `elementwise_loss` is among the outputs

    def needs_gradient(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
        """(T), False where no gradient can arise."""
        needed = np.ones(inputs["target_tokens"].shape, dtype=bool)
        for name in self.silent:
            if name in inputs:
                needed &= inputs[name] != 0
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
        """The default of a config key; None: the request must give it, as config or as an input."""
        value = inspect.signature(self.formula).parameters[key].default
        return None if value is inspect.Parameter.empty else float(value)

    def __call__(self, learner_T: Tensor, inputs: Mapping[str, Tensor], config: Mapping[str, float]) -> LossValue:
        """`inputs` without the targets."""
        trained_T = torch.ones_like(learner_T, dtype=torch.bool)
        for name in self.silent:
            if name in inputs:
                trained_T = trained_T & (inputs[name] != 0)
        # Else 0 times the infinite gradient of a far ratio would be NaN.
        learner_T = torch.where(trained_T, learner_T, learner_T.detach())
        formula_inputs = {name: value for name, value in inputs.items() if name != "weights"}
        terms_T, token_metrics = self.formula(learner_T, **formula_inputs, **config)
        weights_T = inputs.get("weights", torch.ones_like(terms_T))
        terms_T = torch.where(weights_T != 0, terms_T * weights_T, 0.0)
        metrics = {
            "loss:sum": (total := terms_T.sum()).detach(),
            "tokens:sum": trained_T.sum(dtype=torch.float32),
            "weights:sum": weights_T.sum(),
            # By `where`: a mask as an index would make the host wait for the device.
            **{
                f"{name}:sum": torch.where(trained_T, values.detach().float(), 0.0).sum()
                for name, values in token_metrics.items()
            },
        }
        return LossValue(total, {name: value.detach() for name, value in metrics.items()}, terms_T.detach())


_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")
_SAMPLED = ("target_tokens", "logprobs", "advantages")
_WEIGHTS = ("weights",)  # optional everywhere; without them each token weighs 1

LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("cross_entropy", cross_entropy, ("target_tokens",), _WEIGHTS, columns=True, returns_terms=True),
        Loss("importance_sampling", importance_sampling, _SAMPLED, _WEIGHTS),
        Loss("ppo", ppo, _SAMPLED, (*_WEIGHTS, *_THRESHOLDS), _THRESHOLDS),
        Loss("cispo", cispo, _SAMPLED, (*_WEIGHTS, *_THRESHOLDS), _THRESHOLDS),
        Loss("dro", dro, _SAMPLED, _WEIGHTS, ("beta",), silent=_WEIGHTS),
        Loss("gspo", gspo, (*_SAMPLED, "sequence_ratio_mask"), (*_WEIGHTS, *_THRESHOLDS), _THRESHOLDS),
    )
}


def find(name: str) -> Loss:
    """The loss. Raises InvalidField, or UserError for a loss of Tinker's that knapper cannot have."""
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
