"""A layer of Mamba 2 as a recurrence: a convolution of values, keys and queries, then a memory that they are added to.

    S_t = exp(dt_t A) S_{t-1} + k_t (dt_t v_t)^T,   y_t = q_t S_t + D v_t

Source: state space duality, arXiv 2405.21060, equation 15 and, in chunks, section 6; its B, x and C are keys, values
and queries here. N rows, X elements of a row, H value heads, G key heads, D elements of a key, E of a value.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from knapper.engine.layers import chunked, elementwise
from knapper.engine.layers.chunked import ChunkedRecurrence
from knapper.engine.layers.delta_rule import Rows
from knapper.engine.layers.recurrence import Convolution
from knapper.engine.models.recurrent import Mamba2


@dataclass(frozen=True)
class StateSpaceRecurrence(ChunkedRecurrence):
    """Of rows (N, X): what the convolution takes, then dt by head. `decay_H`: -A. `skip_H`: D."""

    facts: Mamba2
    decay_H: Tensor
    bias_H: Tensor
    skip_H: Tensor
    corrects: ClassVar[bool] = False

    def rows(self, convolved_NX: Tensor, more_NX: Tensor) -> Rows:
        facts = self.facts
        active = elementwise.silu(convolved_NX)
        v, k, q = active.split((facts.value_width, facts.key_width, facts.key_width), dim=1)
        k, q = (x.unflatten(1, (facts.groups, -1)) for x in (k, q))
        dt_NH = elementwise.softplus(more_NX + self.bias_H).clamp(min=facts.time_step_min)
        return Rows(q, k, v.unflatten(1, (facts.heads, -1)), -self.decay_H * dt_NH, dt_NH)

    def finished(self, o_NHE: Tensor, rows: Rows) -> Tensor:
        return (o_NHE + self.skip_H[:, None] * rows.v).flatten(1)


def is_invariant(facts: Mamba2, device: torch.device) -> bool:
    """Whether on this device a row has the same bits in a text, in its beginning, as its rest, and decoded."""
    return chunked.is_invariant(_drawn(facts, device), facts.heads, device)


def _drawn(facts: Mamba2, device: torch.device) -> StateSpaceRecurrence:
    """One of these sizes with random weights, to try what its products do."""
    draw = torch.Generator().manual_seed(0)
    weight_KX = torch.randn(facts.taps, facts.conv_width, generator=draw).to(device)
    decay_H = torch.rand(facts.heads, generator=draw).to(device)
    bias_H, skip_H = torch.zeros(facts.heads, device=device), torch.ones(facts.heads, device=device)
    return StateSpaceRecurrence(Convolution(weight_KX), facts, decay_H, bias_H, skip_H)
