"""AdamW on flat arenas: a pure function that leaves its arguments unchanged, also when it fails.

P parameters of one run.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.optim import adamw

from knapper.errors import InvalidField, UserError
from knapper.wire.types import AdamW

_RANGES = {
    "learning_rate": (math.inf, "a finite number, 0 or more"),
    "beta1": (1.0, "0 or more and below 1"),
    "beta2": (1.0, "0 or more and below 1"),
    "eps": (math.inf, "a finite number, 0 or more"),
    "weight_decay": (math.inf, "a finite number, 0 or more"),
    "grad_clip_norm": (math.inf, "a finite number, 0 or more (0: no clipping)"),
}

_ROW = 1024  # numbers whose squares are added in float32: short chains stay exact to 1e-7
_SMALL = 1e-9  # squares of parts of a smaller norm may vanish in float32


@dataclass(frozen=True)
class Moments:
    """Adam's running means of gradients and of their squares, float32 (P), after `step` steps."""

    m_P: Tensor
    v_P: Tensor
    step: int


def check(values: AdamW) -> AdamW:
    """The values, checked. Raises InvalidField."""
    for field in fields(values):
        value = getattr(values, field.name)
        below, allowed = _RANGES[field.name]
        if not 0 <= value < below:  # NaN fails too
            raise InvalidField(f"adam_params.{field.name}", value, allowed)
    return values


def step(
    weights_P: Tensor, grads_P: Tensor, moments: Moments, values: AdamW
) -> tuple[Tensor, Moments, dict[str, float]]:
    """One step: (weights, moments, metrics), all new.

    Source: Adam, arXiv 1412.6980, algorithm 1, with the decoupled weight decay of arXiv 1711.05101, algorithm 2: bias
    correction by the step count, eps outside the root, as torch.optim.AdamW computes it. The fields are those of the
    protocol's AdamParams. With grad_clip_norm > 0 the gradient is first scaled by min(1, grad_clip_norm / (norm +
    1e-6)), the norm being over all of P (arXiv 1211.5063, as torch.nn.utils.clip_grad_norm_ computes it). The metric
    `grad_norm` is the norm before clipping. None is called `step`: training loops merge these metrics into their own
    row, which has one.

    Raises InvalidField for values out of range, and UserError when the result has a number that is not finite; nothing
    has changed then.
    """
    check(values)
    norm = norm_of(grads_P)
    if values.grad_clip_norm > 0:
        scale = values.grad_clip_norm / (norm + 1e-6)
        if scale < 1:
            grads_P = grads_P * scale
    weights_P, m_P, v_P = weights_P.clone(), moments.m_P.clone(), moments.v_P.clone()
    adamw.adamw(
        [weights_P],
        [grads_P],
        [m_P],
        [v_P],
        [],
        [torch.full((), float(moments.step), device=weights_P.device)],
        fused=True,
        amsgrad=False,
        beta1=values.beta1,
        beta2=values.beta2,
        lr=values.learning_rate,
        weight_decay=values.weight_decay,
        eps=values.eps,
        maximize=False,
    )
    names, results = ("weights", "first moments", "second moments"), (weights_P, m_P, v_P)
    for name, result_P, row_norm in zip(names, results, _norms_in_rows(results), strict=True):
        if not math.isfinite(row_norm) and not math.isfinite(_norm_of_any(result_P)):
            raise UserError(
                f"optim_step would make the {name} not finite "
                f"(gradient norm {norm:.3g}, learning_rate {values.learning_rate:.3g}, eps {values.eps:.3g}); "
                "nothing was changed and the gradients are still pending. "
                "Lower learning_rate, set grad_clip_norm, or load an earlier state"
            )
    metrics = {"grad_norm": norm, "learning_rate": values.learning_rate, "optimizer_steps": float(moments.step + 1)}
    return weights_P, Moments(m_P, v_P, moments.step + 1), metrics


def is_finite(values_P: Tensor) -> bool:
    """Whether every number is finite: exactly then the norm is (float32 squares cannot overflow it)."""
    return math.isfinite(_norm_in_rows(values_P)) or math.isfinite(_norm_of_any(values_P))


def norm_of(values_P: Tensor) -> float:
    """The Euclidean norm, to float32's precision, of numbers of any size."""
    norm = _norm_in_rows(values_P)
    return norm if _SMALL < norm < math.inf else _norm_of_any(values_P)


def _norm_in_rows(values_P: Tensor) -> float:
    (norm,) = _norms_in_rows([values_P])
    return norm


def _norms_in_rows(arenas: Sequence[Tensor]) -> list[float]:
    """The norms if float32 squares neither overflow nor vanish: 30 times as fast as with float64 copies."""
    parts: list[Tensor] = []
    for values_P in arenas:
        rows, remainder = values_P.split([len(values_P) // _ROW * _ROW, len(values_P) % _ROW])
        parts += [torch.linalg.vector_norm(rows.view(-1, _ROW), dim=1), torch.linalg.vector_norm(remainder)[None]]
    norms = torch.cat(parts).tolist()  # one transfer
    stops = itertools.accumulate((len(values_P) // _ROW + 1 for values_P in arenas), initial=0)
    return [math.hypot(*norms[start:stop]) for start, stop in itertools.pairwise(stops)]


def _norm_of_any(values_P: Tensor) -> float:
    """In float64 where the device has it."""
    if values_P.device.type == "mps":
        return scaled_norm(values_P)
    return float(torch.linalg.vector_norm(values_P, dtype=torch.float64))


def scaled_norm(values_P: Tensor) -> float:
    """For devices without float64: scaled by the largest element, so that no float32 square overflows."""
    if not len(values_P):
        return 0.0
    largest = values_P.abs().amax()
    squares = (values_P / largest.clamp(min=torch.finfo(torch.float32).tiny)).square()
    norm, scale = torch.stack([squares.sum().sqrt(), largest]).tolist()  # one transfer
    return float(norm) * float(scale)
