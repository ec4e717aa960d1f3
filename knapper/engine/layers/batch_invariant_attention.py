"""Batch-invariant causal attention on a CPU: a row's bits depend on its own past only, so training and decoding agree.

A row is the same computed among all rows of a sequence or alone, a token at a time, whatever the sequences beside it.
For that, every operation is a float32 GEMM or elementwise:

- GEMMs have whole multiples of 8 rows, below which libraries take other kernels, and values are added up 64 keys at a
  time, one block after another: from some 190 summands on, a GEMM's order depends on their number. Where that does not
  keep the bits, GEMMs are cut further (`AttentionLayout`);
- softmax is exp(S - max), with exact zeros where masked, and its sum runs over the same blocks. So masked keys add
  nothing, and a block of them changes nothing.

B sequences, T tokens, C keys, M rows, H heads, G key/value heads, Q heads a key/value head, D head elements.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.models.layer import AttentionLayout, ScoreRule

KEYS: Final = 64
# In the order of the search. On Intel CPUs, by AVX2, the last two rows of 6 n + 2 have other bits than the others, and
# where there are 128 columns few rows others than many; by AVX-512 so do few rows of 192 summands or more.
LAYOUTS: Final = (
    AttentionLayout(),
    AttentionLayout(8, 128),
    AttentionLayout(24, 64),
    AttentionLayout(48, 64),
    AttentionLayout(48, 32),
)
_queries: Final = 64  # of a block in training, or a little more: later keys are skipped
_scores_max: Final = 1 << 18  # of a block: 1 MiB of float32, to stay in the cache


def causal(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, *, scores: ScoreRule) -> Tensor:
    """(B, T, H, D), differentiable in all three, which are float32.

    Without gradients there may be more keys than queries: the queries are the last rows.
    """
    outputs = _Causal.apply(q_BTHD, k_BTGD, v_BTGD, scores)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(outputs, Tensor)
    return outputs


class _Causal(torch.autograd.Function):
    """The gradient is the library's own attention's, which needs only our outputs and normalisers; of windows and caps,
    which that lacks, it is `_backward`. A sink has no value: it is in the normalisers, and in nothing else.
    """

    @staticmethod
    def forward(ctx: Any, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, scores: ScoreRule) -> Tensor:
        outputs_BHTD, normalisers_BHT = _forward(q_BTHD, k_BTGD, v_BTGD, scores)
        ctx.save_for_backward(q_BTHD, k_BTGD, v_BTGD, outputs_BHTD, normalisers_BHT)
        ctx.scores = scores
        return outputs_BHTD.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, outputs_BHTD, normalisers_BHT = ctx.saved_tensors
        scores: ScoreRule = ctx.scores
        if scores.window is not None or scores.cap is not None or q.device.type != "cpu":
            return *_backward(grads[0], q, k, v, outputs_BHTD, normalisers_BHT, scores), None
        grads_in = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(x.transpose(1, 2) for x in (grads[0], q, k, v)),
            outputs_BHTD, normalisers_BHT, 0.0, True, scale=scores.scale,
        )  # fmt: skip
        return *(x.transpose(1, 2) for x in grads_in), None


@dataclass(frozen=True)
class _Block:
    """Some rows of some sequences, and the keys that any of them sees: whole blocks of KEYS."""

    sequences: slice
    rows: slice
    keys: slice
    bias_MC: Tensor  # of a query head's rows, for the last of the keys: -inf where a row does not see one


def _blocks(
    rows: int, past: int, keys_most: int, sizes: tuple[int, int], like: Tensor, scores: ScoreRule
) -> Iterator[_Block]:
    """`past`: keys before the first row. `sizes`: of sequences, and of their query heads."""
    sequences, heads = sizes
    window, queries = scores.window, _queries + -_queries % scores.layout.rows
    for start in range(0, rows, queries):
        stop = min(start + queries, rows)
        first = 0 if window is None else max(0, past + start - window + 1) // KEYS * KEYS
        last = min(_whole_blocks(past + stop), keys_most)
        hides_from = first if window is not None else min(past + start, last - 1)  # all rows see the keys before
        bias_MC = _bias(range(past + start, past + stop), range(hides_from, last), window, like)
        step = max(1, _scores_max // (heads * (stop - start) * (last - first)))
        for chunk in range(0, sequences, step):
            yield _Block(slice(chunk, chunk + step), slice(start, stop), slice(first, last), bias_MC)


def _bias(rows: range, keys: range, window: int | None, like: Tensor) -> Tensor:
    """-inf where a row does not see a key."""
    row_M1 = torch.arange(rows.start, rows.stop, device=like.device)[:, None]
    key_C = torch.arange(keys.start, keys.stop, device=like.device)
    hidden = key_C > row_M1
    if window is not None:
        hidden |= key_C <= row_M1 - window
    return like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)


def _forward(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, scores: ScoreRule) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, D) and the log of each row's sum of exponentials (B, H, T)."""
    sequences, tokens, heads, width = q_BTHD.shape
    total, groups = k_BTGD.shape[1:3]
    past, queries = total - tokens, heads // groups
    keys_BGCD, values_BGCD = (_padded_keys(x) for x in (k_BTGD, v_BTGD))
    q_BGQTD = F.pad(_grouped(q_BTHD * scores.scale, groups), (0, 0, 0, -tokens % scores.layout.rows))
    rows = q_BGQTD.shape[3]
    outputs = q_BTHD.new_empty(sequences, groups, queries, rows, width)
    normalisers = q_BTHD.new_empty(sequences, groups, queries, rows)
    for block in _blocks(rows, past, keys_BGCD.shape[2], (sequences, heads), q_BTHD, scores):
        chunk, of_rows, of_keys = block.sequences, block.rows, block.keys
        q_XMD = q_BGQTD[chunk, :, :, of_rows].flatten(0, 1).flatten(1, 2)
        products_XMC = _scored(q_XMD, keys_BGCD[chunk, :, of_keys].flatten(0, 1), block, scores)
        values_XCD = values_BGCD[chunk, :, of_keys].flatten(0, 1)
        here = outputs[chunk, :, :, of_rows]
        sinks_XM1 = _sinks(scores, here.shape[:-1])
        chunk_outputs, top, sums = _weighted_(products_XMC, values_XCD, sinks_XM1, scores.layout.part)
        here.copy_(chunk_outputs.view(here.shape))
        normalisers[chunk, :, :, of_rows] = (top + sums.log()).view(here.shape[:-1])
    return outputs[:, :, :, :tokens].flatten(1, 2), normalisers[..., :tokens].flatten(1, 2)


def _backward(
    grad_BTHD: Tensor, q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, outputs_BHTD: Tensor, normalisers_BHT: Tensor,
    scores: ScoreRule,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v: each block's scores again, and from them its part.

    Source: FlashAttention, arXiv 2205.14135, algorithm 4; d cap tanh(s / cap) / ds = 1 - tanh(s / cap)^2.
    """
    sequences, tokens, heads, _ = q_BTHD.shape
    groups = k_BTGD.shape[2]
    keys_BGCD, values_BGCD = (_padded_keys(x) for x in (k_BTGD, v_BTGD))
    q_BGQTD, grad_BGQTD = _grouped(q_BTHD * scores.scale, groups), _grouped(grad_BTHD, groups)
    mean_BGQT = (grad_BGQTD * outputs_BHTD.view(grad_BGQTD.shape)).sum(-1)
    normalisers_BGQT = normalisers_BHT.view(mean_BGQT.shape)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q_BGQTD, keys_BGCD, values_BGCD))
    for block in _blocks(tokens, 0, keys_BGCD.shape[2], (sequences, heads), q_BTHD, scores):
        chunk, of_rows, of_keys = block.sequences, block.rows, block.keys
        q_XMD, grad_XMD = (x[chunk, :, :, of_rows].flatten(0, 1).flatten(1, 2) for x in (q_BGQTD, grad_BGQTD))
        keys_XCD, values_XCD = (x[chunk, :, of_keys].flatten(0, 1) for x in (keys_BGCD, values_BGCD))
        capped_XMC = _scored(q_XMD, keys_XCD, block, scores)
        rows_X = [x[chunk, :, :, of_rows].flatten(0, 1).flatten(1, 2)[..., None] for x in (normalisers_BGQT, mean_BGQT)]
        slope_XMC = None if scores.cap is None else 1 - (capped_XMC.clamp_min(-scores.cap) / scores.cap).square()
        p_XMC = capped_XMC.sub_(rows_X[0]).exp_()
        grad_scores = torch.bmm(grad_XMD, values_XCD.transpose(1, 2)).sub_(rows_X[1]).mul_(p_XMC)
        if slope_XMC is not None:
            grad_scores.mul_(slope_XMC)
        here = grad_q[chunk, :, :, of_rows]
        here.copy_(torch.bmm(grad_scores, keys_XCD).mul_(scores.scale).view(here.shape))
        for grads, rows_XCD in ((grad_k, torch.bmm(grad_scores.transpose(1, 2), q_XMD)),
                                (grad_v, torch.bmm(p_XMC.transpose(1, 2), grad_XMD))):  # fmt: skip
            there = grads[chunk, :, of_keys]
            there.add_(rows_XCD.view(there.shape))
    keys = k_BTGD.shape[1]
    grad_k, grad_v = (x[:, :, :keys].transpose(1, 2) for x in (grad_k, grad_v))
    return grad_q.permute(0, 3, 1, 2, 4).flatten(2, 3), grad_k, grad_v


def _grouped(x_BTHD: Tensor, groups: int) -> Tensor:
    """(B, G, Q, T, D)."""
    return torch.unflatten(x_BTHD, 2, (groups, -1)).permute(0, 2, 3, 1, 4)


def _padded_keys(x_BTGD: Tensor) -> Tensor:
    """(B, G, C, D), in whole blocks."""
    total = x_BTGD.shape[1]
    return F.pad(x_BTGD.transpose(1, 2), (0, 0, 0, _whole_blocks(total) - total))


def _scored(q_XMD: Tensor, keys_XCD: Tensor, block: _Block, scores: ScoreRule) -> Tensor:
    """(X, M, C): capped products, -inf where a row does not see a key."""
    products_XMC = product(q_XMD, keys_XCD.transpose(1, 2), scores.layout.part)
    cap_(products_XMC, scores)
    rows, keys = block.bias_MC.shape
    products_XMC.view(-1, rows, products_XMC.shape[-1])[..., -keys:].add_(block.bias_MC)
    return products_XMC


def product(x_XMI: Tensor, y_XIN: Tensor, part: int) -> Tensor:
    """x y (X, M, N), of at most `part` columns and summands at a time (0: all)."""
    if not part or max(y_XIN.shape[1:]) <= part:
        return torch.bmm(x_XMI, y_XIN)
    summands = zip(x_XMI.split(part, dim=2), y_XIN.split(part, dim=1), strict=True)
    outputs_XMN = _by_columns(*next(summands), part)
    for x, y in summands:
        outputs_XMN += _by_columns(x, y, part)
    return outputs_XMN


def _by_columns(x_XMI: Tensor, y_XIN: Tensor, part: int) -> Tensor:
    columns = y_XIN.split(part, dim=2)
    return torch.bmm(x_XMI, y_XIN) if len(columns) == 1 else torch.cat([torch.bmm(x_XMI, y) for y in columns], dim=2)


def cap_(products: Tensor, scores: ScoreRule) -> None:
    if scores.cap is not None:
        products.div_(scores.cap).tanh_().mul_(scores.cap)


def _sinks(scores: ScoreRule, shape: Sequence[int]) -> Tensor | None:
    """Each row's, for products of (B, G, Q, rows): (B * G, Q * rows, 1)."""
    if scores.sinks_H is None:
        return None
    sinks_GQ1 = scores.sinks_H.view(shape[1], shape[2], 1)
    return sinks_GQ1.expand(*shape).reshape(shape[0] * shape[1], -1, 1)


def _whole_blocks(keys: int) -> int:
    return keys + -keys % KEYS


def _weighted_(
    scores_XMC: Tensor, values_XCD: Tensor, sinks_XM1: Tensor | None, part: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values weighted by the scores' softmax, maxima, and sums of exponentials.

    Overwrites the scores.
    """
    top = scores_XMC.amax(-1, keepdim=True)
    top = top if sinks_XM1 is None else torch.maximum(top, sinks_XM1)
    sums = scores_XMC.sub_(top).exp_().unflatten(-1, (-1, KEYS)).sum(-1)
    sums = sums if sums.shape[-1] == 1 else sums.cumsum(-1)[..., -1:]
    sums = sums if sinks_XM1 is None else sums + (sinks_XM1 - top).exp()
    parts = zip(scores_XMC.split(KEYS, dim=-1), values_XCD.split(KEYS, dim=1), strict=True)
    outputs = product(*next(parts), part)
    for of_keys in parts:
        outputs += product(
            *of_keys, part
        )  # what a product is added to must not be part of it: pages are added up the same
    return outputs / sums, top, sums
