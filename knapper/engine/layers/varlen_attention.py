"""Causal attention over packed rows on a GPU: one kernel for sequences of any lengths, torch's own `varlen_attn`.

It takes grouped queries and more keys than queries without a mask. A mask would make torch compute all scores: for a
prompt of 30,000 tokens that continues a cached one, a hundred GB. N rows, M keys, H heads, G key/value heads, D head
elements.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from knapper.engine.models.layer import ScoreRule
from knapper.engine.transfer import to_device


def computes(rows_NHD: Tensor, scores: ScoreRule) -> bool:
    """Whether the kernel takes these rows: of 16 bits, on a GPU, without a cap on scores."""
    on_gpu = rows_NHD.device.type not in ("cpu", "mps")
    return on_gpu and scores.cap is None and rows_NHD.dtype in (torch.bfloat16, torch.float16)


class VarlenAttention:
    """Sequences one after another, with numbers of queries and of keys; the queries of each are its last rows."""

    def __init__(self, queries: Sequence[int], keys: Sequence[int]) -> None:
        self._longest = max(queries), max(keys)
        self._lengths = queries, keys
        self._bounds: list[Tensor] = []  # int32, where each sequence starts, and where the last ends

    def __call__(self, q_NHD: Tensor, k_MGD: Tensor, v_MGD: Tensor, scores: ScoreRule) -> Tensor:
        """(N, H, D). Differentiable in all three."""
        # Only where it is used: the import registers operators, which takes a CPU's start time for nothing.
        from torch.nn.attention.varlen import varlen_attn

        if not self._bounds:
            self._bounds = [
                to_device(list(accumulate(lengths, initial=0)), q_NHD.device, torch.int32) for lengths in self._lengths
            ]
        (queries, keys), (longest_queries, longest_keys) = self._bounds, self._longest
        before = -1 if scores.window is None else scores.window - 1  # keys before a row's own
        outputs = varlen_attn(
            q_NHD, k_MGD, v_MGD, queries, keys, longest_queries, longest_keys, scale=scores.scale,
            window_size=(before, 0), enable_gqa=True,
        )  # fmt: skip
        assert isinstance(outputs, Tensor)
        return outputs
