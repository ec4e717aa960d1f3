"""How a decoding step sees the past of its sequences: keys and values in pools, and states.

N rows, H heads, G key/value heads, D head elements, C capacity, Q queries a key/value head.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from knapper.engine.layers import batch_invariant_attention
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.layers.recurrence import Recurrence, Stops
from knapper.engine.models.layer import ScoreRule

if TYPE_CHECKING:
    from knapper.engine.sampling.kv_cache import Pool


@dataclass(frozen=True)
class PoolPart:
    pool: "Pool"
    rows_N: Tensor
    at_N: Tensor  # the position that this step fills
    dtype: torch.dtype
    _biases: dict[int | None, Tensor] = field(default_factory=dict)

    def bias_N11C(self, window: int | None) -> Tensor:
        """-inf past the position, and before its window; made once for all layers of a window."""
        if window not in self._biases:
            key_C = torch.arange(self.pool.capacity, device=self.at_N.device)
            masked = key_C > self.at_N[:, None]
            if window is not None:
                masked |= key_C <= self.at_N[:, None] - window
            zeros = torch.zeros(masked.shape, dtype=self.dtype, device=self.at_N.device)
            self._biases[window] = zeros.masked_fill_(masked, -torch.inf)[:, None, None, :]
        return self._biases[window]


class Attention:
    """One new token a sequence: stores its key and value, then attends over the sequence's own past."""

    def __init__(self, parts: list[PoolPart]) -> None:
        self._parts = parts
        self._sizes = [len(part.pool.slots) for part in parts]
        self.positions_N = torch.cat([part.at_N for part in parts])

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor:
        rows, _, head_dim = q_NHD.shape
        q_NGQD = q_NHD.reshape(rows, k_NGD.shape[1], -1, head_dim)
        if len(self._parts) == 1:
            return self._part(layer, self._parts[0], scores, q_NGQD, k_NGD, v_NGD).reshape(rows, -1)
        split = (x.split(self._sizes) for x in (q_NGQD, k_NGD, v_NGD))
        outputs = [self._part(layer, part, scores, *qkv) for part, *qkv in zip(self._parts, *split, strict=True)]
        return torch.cat(outputs).reshape(rows, -1)

    def recur(
        self,
        layer: int,
        recurrence: Recurrence,
        x_NX: Tensor,
        *,
        keeps: bool = False,  # noqa: ARG002  it always does
    ) -> tuple[Tensor, list[Stops]]:
        parts = zip(self._parts, x_NX.split(self._sizes), strict=True)
        return torch.cat([recurrence.step(x, part.pool.states(layer), part.at_N) for part, x in parts]), []

    @staticmethod
    def _part(layer: int, part: PoolPart, scores: ScoreRule, q_NGQD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        keys, values = part.pool.layer(layer)
        keys[part.rows_N, :, part.at_N] = k_NGD
        values[part.rows_N, :, part.at_N] = v_NGD
        bias_N11C = part.bias_N11C(scores.window)
        if keeps_bits(q_NGQD.device):  # bit-equal to training
            return batch_invariant_attention.decoded(q_NGQD, keys, values, bias_N11C, scores)
        products = torch.matmul(q_NGQD * scores.scale, keys.transpose(-1, -2))
        capped = products if scores.cap is None else torch.tanh(products.float() / scores.cap) * scores.cap
        return torch.matmul(_softmax(capped.add_(bias_N11C), scores).to(values.dtype), values)


def _softmax(products_NGQC: Tensor, scores: ScoreRule) -> Tensor:
    """Of the keys; a sink takes its part of it."""
    if scores.sinks_H is None:
        return products_NGQC.softmax(-1)
    sequences, groups, queries, _ = products_NGQC.shape
    sinks_NGQ1 = scores.sinks_H.view(groups, queries, 1).expand(sequences, -1, -1, -1)
    return torch.cat([products_NGQC, sinks_NGQ1.to(products_NGQC.dtype)], dim=-1).softmax(-1)[..., :-1]
