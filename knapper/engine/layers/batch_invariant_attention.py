"""Batch-invariant causal attention on a CPU: a row's bits depend on its own past only, so training and decoding agree.

A row is the same computed among all rows of a sequence or alone, a token at a time, whatever the sequences beside it.
For that, every operation is a float32 GEMM or elementwise:

- GEMMs have at least 8 rows, below which libraries take other kernels, and values are added up 64 keys at a time, one
  block after another: from some 190 summands on, a GEMM's order depends on their number;
- softmax is exp(S - max), with exact zeros where masked, and its sum runs over the same blocks. So masked keys add
  nothing, and a block of them changes nothing.

B sequences, T tokens, C keys, M rows, H heads, G key/value heads, Q heads a key/value head, D head elements.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

KEYS: Final = 64
ROWS_MIN: Final = 8
_queries: Final = 64  # of a block in training: later keys are skipped
_scores_max: Final = 1 << 18  # of a block: 1 MiB of float32, to stay in the cache


def causal(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
    """(B, T, H, D), differentiable in all three, which are float32 on a CPU.

    Without gradients there may be more keys than queries: the queries are the last rows.
    """
    outputs = _Causal.apply(q_BTHD, k_BTGD, v_BTGD)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(outputs, Tensor)
    return outputs


def decoded(q_NGQD: Tensor, keys_NGCD: Tensor, values_NGCD: Tensor, bias_N11C: Tensor) -> Tensor:
    """(N, G, Q, D): one token of each of N sequences over its own keys. `bias_N11C`: -inf where a sequence has none.

    C is a multiple of KEYS; keys and values past a sequence's end are finite.
    """
    sequences, groups, queries, width = q_NGQD.shape
    rows = max(ROWS_MIN, queries)  # the padding enters the GEMMs only
    q_NGMD = q_NGQD.new_zeros(sequences, groups, rows, width)
    torch.mul(q_NGQD, width**-0.5, out=q_NGMD[:, :, :queries])
    scores = torch.bmm(q_NGMD.flatten(0, 1), keys_NGCD.flatten(0, 1).transpose(1, 2))
    scores.view(sequences, groups, rows, -1)[:, :, :queries].add_(bias_N11C)
    return _weighted_(scores, values_NGCD.flatten(0, 1), queries)[0].view(sequences, groups, queries, width)


@torch.inference_mode()
def is_invariant(heads: int, groups: int, width: int) -> bool:
    """Whether on this CPU a row has the same bits in a sequence, in a prefix of it, as its rest, and decoded."""
    tokens = 3 * KEYS + 5
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, count, width, generator=generator) for count in (heads, groups, groups))
    whole = causal(q, k, v)
    for count in (1, 7, KEYS, KEYS + 1, 2 * KEYS + 9):
        prefix = causal(*(x[:, :count] for x in (q, k, v)))
        suffix = causal(q[:, count:], k, v)
        if not (torch.equal(prefix, whole[:, :count]) and torch.equal(suffix, whole[:, count:])):
            return False
        capacity = _whole_blocks(count)
        keys, values = (F.pad(x[:, :count].transpose(1, 2), (0, 0, 0, capacity - count)) for x in (k, v))
        bias = torch.zeros(1, 1, 1, capacity)
        bias[..., count:] = -torch.inf
        row_1GQD = q[:, count - 1].view(1, groups, heads // groups, width)
        if not torch.equal(decoded(row_1GQD, keys, values, bias).flatten(1, 2), whole[:, count - 1]):
            return False
    return True


class _Causal(torch.autograd.Function):
    """The gradient is the library's own attention's, which needs only our outputs and normalisers."""

    @staticmethod
    def forward(ctx: Any, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> Tensor:
        outputs_BHTD, normalisers_BHT = _forward(q_BTHD, k_BTGD, v_BTGD)
        ctx.save_for_backward(q_BTHD, k_BTGD, v_BTGD, outputs_BHTD, normalisers_BHT)
        return outputs_BHTD.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, outputs_BHTD, normalisers_BHT = ctx.saved_tensors
        grads_in = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (grads[0], q, k, v)), outputs_BHTD, normalisers_BHT, 0.0, True
        )
        return tuple(x.transpose(1, 2) for x in grads_in)


def _forward(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, D) and the log of each row's sum of exponentials (B, H, T)."""
    sequences, tokens, heads, width = q_BTHD.shape
    total, groups = k_BTGD.shape[1:3]
    past, queries = total - tokens, heads // groups
    keys_BGCD, values_BGCD = (
        F.pad(x.transpose(1, 2), (0, 0, 0, _whole_blocks(total) - total)) for x in (k_BTGD, v_BTGD)
    )
    q_BGQTD = F.pad(
        (q_BTHD * width**-0.5).view(sequences, tokens, groups, queries, width).permute(0, 2, 3, 1, 4),
        (0, 0, 0, -tokens % ROWS_MIN),
    )
    rows = q_BGQTD.shape[3]
    outputs = q_BTHD.new_empty(sequences, groups, queries, rows, width)
    normalisers = q_BTHD.new_empty(sequences, groups, queries, rows)
    mask = q_BTHD.new_full((_queries, _queries + KEYS), -torch.inf).triu_(1)
    for start in range(0, rows, _queries):
        stop = min(start + _queries, rows)
        keys = min(_whole_blocks(past + stop), keys_BGCD.shape[2])
        first_hidden_key = past + start  # the first key that some of these rows must not see
        step = max(1, _scores_max // (heads * (stop - start) * keys))
        for first in range(0, sequences, step):
            chunk = slice(first, first + step)
            q_XMD = q_BGQTD[chunk, :, :, start:stop].reshape(-1, queries * (stop - start), width)
            scores_XMC = torch.bmm(q_XMD, keys_BGCD[chunk, :, :keys].flatten(0, 1).transpose(1, 2))
            scores_XMC.view(-1, stop - start, keys)[..., first_hidden_key:].add_(
                mask[: stop - start, : keys - first_hidden_key]
            )
            values_XCD = values_BGCD[chunk, :, :keys].flatten(0, 1)
            chunk_outputs, top, sums = _weighted_(scores_XMC, values_XCD, scores_XMC.shape[1])
            outputs[chunk, :, :, start:stop] = chunk_outputs.view(-1, groups, queries, stop - start, width)
            normalisers[chunk, :, :, start:stop] = (top + sums.log()).view(-1, groups, queries, stop - start)
    return outputs[:, :, :, :tokens].flatten(1, 2), normalisers[..., :tokens].flatten(1, 2)


def _whole_blocks(keys: int) -> int:
    return keys + -keys % KEYS


def _weighted_(scores_XMC: Tensor, values_XCD: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first `rows` rows: values weighted by the scores' softmax, maxima, and sums of exponentials.

    Overwrites the scores.
    """
    p_XRC = scores_XMC[:, :rows]
    top = p_XRC.amax(-1, keepdim=True)
    sums = p_XRC.sub_(top).exp_().unflatten(-1, (-1, KEYS)).sum(-1)
    sums = sums if sums.shape[-1] == 1 else sums.cumsum(-1)[..., -1:]
    parts = zip(scores_XMC.split(KEYS, dim=-1), values_XCD.split(KEYS, dim=1), strict=True)
    outputs = torch.bmm(*next(parts))
    for part in parts:
        outputs.baddbmm_(*part)
    return outputs[:, :rows] / sums, top, sums
