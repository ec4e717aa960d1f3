"""How a decoding step sees the past of its sequences: keys and values in pages, and states.

N rows, H heads, G key/value heads, D head elements, Q queries a key/value head.
"""

from dataclasses import dataclass

from torch import Tensor

from knapper.engine.layers import paged_attention
from knapper.engine.layers.paged_attention import PageTable
from knapper.engine.layers.recurrence import Recurrence, Stops
from knapper.engine.models.layer import ScoreRule
from knapper.engine.sampling.places import Places


@dataclass(frozen=True)
class Attention:
    """One new token a sequence: stores its key and value, then attends over the sequence's own past."""

    pages: Places
    states: Places
    table: PageTable

    @property
    def positions_N(self) -> Tensor:
        return self.table.at_N

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor:
        q_NGQD = q_NHD.reshape(len(q_NHD), k_NGD.shape[1], -1, q_NHD.shape[-1])
        keys, values = self.pages.layer(layer)
        self.table.store(keys, k_NGD)
        self.table.store(values, v_NGD)
        return paged_attention.decoded(q_NGQD, keys, values, self.table, scores).reshape(len(q_NHD), -1)

    def recur(
        self,
        layer: int,
        recurrence: Recurrence,
        x_NX: Tensor,
        *,
        keeps: bool = False,  # noqa: ARG002  it always does
    ) -> tuple[Tensor, list[Stops]]:
        return recurrence.step(x_NX, self.states.layer(layer), self.positions_N), []
