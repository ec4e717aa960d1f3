"""A layer of the gated delta rule as a recurrence: a convolution of queries, keys and values, then the rule in chunks.

Source: Gated Delta Networks, arXiv 2412.06464, section 3.4, as Qwen3-Next and Qwen3.5 have it. N rows, X elements of a
row, H value heads, G key heads, D elements of a key, E of a value.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from knapper.engine.layers import chunked, elementwise
from knapper.engine.layers.chunked import ChunkedRecurrence
from knapper.engine.layers.delta_rule import Rows
from knapper.engine.layers.recurrence import Convolution
from knapper.engine.models.recurrent import GatedDelta

_NORM_EPS: Final = 1e-6  # of queries and keys; config.json does not state it


@dataclass(frozen=True)
class GatedDeltaRecurrence(ChunkedRecurrence):
    """Of rows (N, X): what the convolution takes, then b and a by head. `decay_H`: how fast the memory decays at a gate
    of one.
    """

    facts: GatedDelta
    decay_H: Tensor
    bias_H: Tensor
    corrects: ClassVar[bool] = True

    def rows(self, convolved_NX: Tensor, more_NX: Tensor) -> Rows:
        facts = self.facts
        b_NH, a_NH = more_NX.chunk(2, dim=1)
        active = elementwise.silu(convolved_NX)
        q, k, v = active.split((facts.key_width, facts.key_width, facts.value_width), dim=1)
        q, k = (_unit(x.unflatten(1, (facts.key_heads, -1))) for x in (q, k))
        gates, beta = elementwise.softplus(a_NH + self.bias_H), elementwise.sigmoid(b_NH)
        q = q * facts.key_dim**-0.5
        return Rows(q, k, v.unflatten(1, (facts.value_heads, -1)), -self.decay_H * gates, beta)

    def finished(self, o_NHE: Tensor, rows: Rows) -> Tensor:  # noqa: ARG002  as of other recurrences
        return o_NHE.flatten(1)


def is_invariant(facts: GatedDelta, device: torch.device) -> bool:
    """Whether on this device a row has the same bits in a text, in its beginning, as its rest, and decoded."""
    return chunked.is_invariant(_drawn(facts, device), 2 * facts.value_heads, device)


def _drawn(facts: GatedDelta, device: torch.device) -> GatedDeltaRecurrence:
    """One of these sizes with random weights, to try what its products do."""
    draw = torch.Generator().manual_seed(0)
    weight_KX = torch.randn(facts.taps, facts.conv_width, generator=draw).to(device)
    decay_H = torch.rand(facts.value_heads, generator=draw).to(device)
    bias_H = torch.zeros(facts.value_heads, device=device)
    return GatedDeltaRecurrence(Convolution(weight_KX), facts, decay_H, bias_H)


def _unit(x: Tensor) -> Tensor:
    """Of length one: x / sqrt(sum(x^2) + eps)."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPS)
