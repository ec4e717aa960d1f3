"""Causal attention over packed rows on a GPU: one kernel for sequences of any lengths, torch's own `varlen_attn`.

It takes grouped queries and more keys than queries without a mask. A mask would make torch compute all scores: for a
prompt of 30,000 tokens that continues a cached one, a hundred GB. N rows, M keys, H heads, G key/value heads, D head
elements.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from knapper.engine.layers import batch_invariant_attention
from knapper.engine.models.layer import ScoreRule
from knapper.engine.transfer import to_device


def computes(rows_NHD: Tensor, scores: ScoreRule) -> bool:
    """Whether the kernel takes these rows: of 16 bits, on a GPU, without a cap on scores or sinks."""
    on_gpu = rows_NHD.device.type not in ("cpu", "mps")
    plain = scores.cap is None and scores.sinks_H is None
    return on_gpu and plain and rows_NHD.dtype in (torch.bfloat16, torch.float16)


class VarlenAttention:
    """Sequences one after another, with numbers of queries and of keys; the queries of each are its last rows."""

    def __init__(self, queries: Sequence[int], keys: Sequence[int]) -> None:
        self._longest = max(queries), max(keys)
        self._lengths = queries, keys
        self._bounds: list[Tensor] = []  # int32, where each sequence starts, and where the last ends

    def __call__(self, q_NHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, scores: ScoreRule) -> Tensor:
        """(N, H, D). Differentiable in all three."""
        if not self._bounds:
            self._bounds = [
                to_device(list(accumulate(lengths, initial=0)), q_NHD.device, torch.int32) for lengths in self._lengths
            ]
        (queries, keys), (longest_queries, longest_keys) = self._bounds, self._longest
        before = -1 if scores.window is None else scores.window - 1  # keys before a row's own
        outputs = _kernel()(
            q_NHD, k_MGD, v_MGD, queries, keys, longest_queries, longest_keys, scale=scores.scale,
            window_size=(before, 0),
        )  # fmt: skip
        assert isinstance(outputs, Tensor)
        return outputs


class VarlenReference:
    """`VarlenAttention` on a CPU, in float32: what the kernel is compared with."""

    def __init__(self, queries: Sequence[int], keys: Sequence[int]) -> None:
        self._queries, self._keys = list(queries), list(keys)

    def __call__(self, q_NHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, scores: ScoreRule) -> Tensor:
        """(N, H, D), in the dtype of q. Differentiable in all three."""
        q, k, v = (
            x.float().split(lengths)
            for x, lengths in ((q_NHD, self._queries), (k_MGD, self._keys), (v_MGD, self._keys))
        )
        each = (
            batch_invariant_attention.causal(*(x[None] for x in of_one), scores=scores)[0]
            for of_one in zip(q, k, v, strict=True)
        )
        return torch.cat(list(each)).to(q_NHD.dtype)


@cache
def _kernel() -> Callable[..., Any]:
    """torch's. Before 2.12 it takes grouped queries without being told so."""
    # Only where it is used: the import registers operators, which takes a CPU's start time for nothing.
    from torch.nn.attention.varlen import varlen_attn

    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, enable_gqa=True) if told else varlen_attn
