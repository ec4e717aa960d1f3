"""How packed rows see the past of their sequences: by causal attention, or through a recurrence's state.

A sequence sees itself alone, so its bits do not depend on its neighbours. N rows, H heads, G key/value heads, D head
elements, T tokens of one sequence. Source: arXiv 1706.03762, equation 1, with the grouped queries of arXiv 2305.13245.
"""

import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.layers import batch_invariant_attention, varlen_attention
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.layers.recurrence import PackedRows, Recurrence, State, Stops
from knapper.engine.layers.varlen_attention import VarlenAttention
from knapper.engine.models.layer import ScoreRule
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.engine.transfer import to_device


def attention_dtype(base: torch.dtype, device: torch.device) -> torch.dtype:
    """float32 where bits are kept (a CPU's bfloat16 attention is slower and coarser, too); else the base's dtype."""
    return torch.float32 if keeps_bits(device) else base


Recurred = tuple[Tensor, list[Stops]]  # outputs, and by sequence the states that were asked for


class Attend(Protocol):
    """Rotated queries (N, H, D), keys and values (N, G, D) of one layer to outputs (N, H * D).

    `layer`: its number among those with attention; of `recur` among those with a recurrence.
    """

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor: ...

    def recur(self, layer: int, recurrence: Recurrence, x_NX: Tensor, *, keeps: bool = False) -> Recurred: ...


class PackedAttention:
    """Sequences one after another. Those of equal length share one call; none is ever padded."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self._varlen = VarlenAttention(lengths, lengths)
        self._rows = PackedRows(self.lengths)
        self._buckets: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            self._buckets.setdefault(length, []).append(index)

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor:  # noqa: ARG002  the protocol gives each layer its number
        rows = q_NHD.shape[0]
        if varlen_attention.computes(q_NHD, scores):
            return self._varlen(q_NHD, k_NGD, v_NGD, scores).reshape(rows, -1)
        if len(self._buckets) == 1:
            qkv = (x.view(len(self.lengths), -1, *x.shape[1:]) for x in (q_NHD, k_NGD, v_NGD))
            return _causal(*qkv, scores=scores).reshape(rows, -1)
        q, k, v = (x.split(self.lengths) for x in (q_NHD, k_NGD, v_NGD))
        outputs: list[Tensor] = [q_NHD] * len(self.lengths)
        for indices in self._buckets.values():
            o_BTHD = _causal(*(torch.stack([x[index] for index in indices]) for x in (q, k, v)), scores=scores)
            for index, o_THD in zip(indices, o_BTHD.unbind(), strict=True):
                outputs[index] = o_THD
        return torch.cat(outputs).reshape(rows, -1)

    def recur(self, layer: int, recurrence: Recurrence, x_NX: Tensor, *, keeps: bool = False) -> Recurred:  # noqa: ARG002  as above
        return recurrence.packed(x_NX, self._rows, keeps=keeps)


class SharedPrefixAttention:
    """Rows that several sequences share (`Prefixes`): each sequence attends as if it were alone.

    So it has the bits that it has alone. Every sequence gives a shared row the same output; the first one's is taken.
    """

    def __init__(self, lengths: Sequence[int], rows_N: Tensor, first_U: Tensor) -> None:
        self._packed, self._rows_N, self._first_U = PackedAttention(lengths), rows_N, first_U

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor:
        q, k, v = (x.index_select(0, self._rows_N) for x in (q_NHD, k_NGD, v_NGD))
        return self._packed(layer, q, k, v, scores=scores).index_select(0, self._first_U)

    def recur(self, layer: int, recurrence: Recurrence, x_NX: Tensor, *, keeps: bool = False) -> Recurred:
        y_NY, kept = self._packed.recur(layer, recurrence, x_NX.index_select(0, self._rows_N), keeps=keeps)
        return y_NY.index_select(0, self._first_U), kept


class ContinuedAttention:
    """The rest of one sequence after its prefix: `past_kv` (layers, 2, P, G, D), and by layer the states after it."""

    def __init__(self, past_kv: Tensor, states: Sequence[State] = ()) -> None:
        self._past_kv, self._states = past_kv, states
        self._varlen: VarlenAttention | None = None

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor:
        keys, values = self._past_kv[layer]
        k, v = torch.cat([keys, k_NGD]), torch.cat([values, v_NGD])
        if varlen_attention.computes(q_NHD, scores):
            self._varlen = self._varlen or VarlenAttention([len(q_NHD)], [len(k)])
            return self._varlen(q_NHD, k, v, scores).reshape(q_NHD.shape[0], -1)
        return _causal(q_NHD[None], k[None], v[None], scores=scores).reshape(q_NHD.shape[0], -1)

    def recur(self, layer: int, recurrence: Recurrence, x_NX: Tensor, *, keeps: bool = False) -> Recurred:
        rows = PackedRows([len(x_NX)], self._past_kv.shape[2], self._states[layer])
        return recurrence.packed(x_NX, rows, keeps=keeps)


class ConcatenatedAttention:
    """Several groups of rows, one after another, each with its own attention."""

    def __init__(self, attends: Sequence[Attend], rows: Sequence[int]) -> None:
        self._attends, self._rows = attends, list(rows)

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor:
        if len(self._attends) == 1:
            return self._attends[0](layer, q_NHD, k_NGD, v_NGD, scores=scores)
        parts = zip(*(x.split(self._rows) for x in (q_NHD, k_NGD, v_NGD)), strict=True)
        each = zip(self._attends, parts, strict=True)
        return torch.cat([attend(layer, *part, scores=scores) for attend, part in each])

    def recur(self, layer: int, recurrence: Recurrence, x_NX: Tensor, *, keeps: bool = False) -> Recurred:
        each = zip(self._attends, x_NX.split(self._rows), strict=True)
        outputs, kept = zip(*(attend.recur(layer, recurrence, x, keeps=keeps) for attend, x in each), strict=True)
        return torch.cat(outputs), list(itertools.chain(*kept))


class RecordedAttention:
    """Another attention, whose keys and values are also stored for decoding: `kv` (layers, 2, N, G, D).

    `states`: by layer with a recurrence, of each sequence.
    """

    def __init__(self, attend: Attend, kv: Tensor) -> None:
        self._attend, self._kv = attend, kv
        self.states: list[list[Stops]] = []

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule) -> Tensor:
        self._kv[layer, 0].copy_(k_NGD)
        self._kv[layer, 1].copy_(v_NGD)
        return self._attend(layer, q_NHD, k_NGD, v_NGD, scores=scores)

    def recur(self, layer: int, recurrence: Recurrence, x_NX: Tensor, *, keeps: bool = False) -> Recurred:  # noqa: ARG002  it keeps them
        y_NY, kept = self._attend.recur(layer, recurrence, x_NX, keeps=True)
        self.states.append(kept)
        return y_NY, kept


def prefix_attention(groups: Sequence[Prefixes], device: torch.device) -> Attend:
    """The attention of the groups' computed rows, one group after another."""
    lengths = [length for group in groups for length in group.lengths]
    if all(len(group) == group.total for group in groups):
        return PackedAttention(lengths)
    rows_N = _offset_by_part([group.rows_N for group in groups], [len(group) for group in groups])
    first_U = _offset_by_part([group.first_U for group in groups], [group.total for group in groups])
    return SharedPrefixAttention(lengths, to_device(rows_N, device), to_device(first_U, device))


def _offset_by_part(rows: Sequence[NDArray[np.int64]], sizes: Sequence[int]) -> NDArray[np.int64]:
    """Indices within each of several parts, as indices within the whole."""
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return np.concatenate([part + start for part, start in zip(rows, starts, strict=True)])


def _causal(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, *, scores: ScoreRule) -> Tensor:
    if keeps_bits(q_BTHD.device) or scores.cap is not None or scores.sinks_H is not None:
        # Bit-equal to decoding; and no kernel has caps or sinks.
        wide = (x.to(torch.float32) for x in (q_BTHD, k_BTGD, v_BTGD))
        return batch_invariant_attention.causal(*wide, scores=scores).to(q_BTHD.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    mask = _mask(q.shape[2], k.shape[2], scores.window, q.device)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


def _mask(tokens: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Which keys each row sees; None where the kernel's own causal mask says it."""
    if window is None and tokens == keys:
        return None
    seen = torch.ones(tokens, keys, dtype=torch.bool, device=device).tril_(keys - tokens)
    return seen if window is None else seen.triu_(keys - tokens - window + 1)
