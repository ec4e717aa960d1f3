"""From hidden states to the log-probabilities of target tokens, without ever holding rows x vocabulary.

N rows, H hidden, V vocabulary, K targets of a row, R rank, C rows of a chunk.

The head's weight W is frozen, so that a row's gradient is known up to a factor while its logits are in memory: d
logp(t) / d h = W[t] - softmax(W h) W. The forward pass keeps the second term, (N, H), and the backward pass scales
rows: two products with W instead of three. A head with a LoRA needs the softmax again for the LoRA's gradient, and
computes it again, chunk by chunk.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knapper.engine.layers.adapters import for_products, pad_rank, padded_rank, product
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora_on_gpu import wide_product
from knapper.engine.layers.row_padding import row_sums
from knapper.engine.transfer import to_device

ELEMENTS_MAX = 1 << 24  # logits in memory at a time: 64 MiB of float32
ROWS_MIN = 16  # smaller products take other kernels, whose last bits differ


@dataclass(frozen=True)
class HeadLora:
    """`a` (R, H), `b` (V, R): logits += scale * (h @ a.T) @ b.T"""

    a: Tensor
    b: Tensor
    scale: float


def target_logprobs(
    hidden_NH: Tensor,
    head: FrozenLinear,
    targets: Tensor,
    lora: HeadLora | None = None,
    needed_N: NDArray[np.bool_] | None = None,
    cap: float | None = None,
) -> Tensor:
    """Log-probabilities of `targets`, int64 (N) or (N, K), in their shape; float32 (float64 for float64 hidden states).

    Differentiable in the hidden states and in the LoRA; the head is frozen. `needed_N`: False promises a zero gradient,
    and skips the row's backward work; a broken promise is an AssertionError (on a CPU). It is an array of the host, so
    that the host never waits for the device. `cap`: of the logits (`capped_`).
    """
    columns_NK = targets.unsqueeze(1) if targets.dim() == 1 else targets
    if needed_N is None:
        needed_N = np.ones(len(hidden_NH), dtype=bool)
    if lora is None:
        logprobs = _FrozenHead.apply(hidden_NH, head, columns_NK, needed_N, cap)  # type: ignore[no-untyped-call]  # the library has no types here
    else:
        logprobs = _AdaptedHead.apply(  # type: ignore[no-untyped-call]  # the library has no types here
            hidden_NH, head, columns_NK, needed_N, cap, lora.a, lora.b, lora.scale
        )
    assert isinstance(logprobs, Tensor)
    return logprobs.squeeze(1) if targets.dim() == 1 else logprobs


def capped_(logits_NV: Tensor, cap: float | None) -> Tensor:
    """cap tanh(l / cap), in place; unchanged without a cap.

    Source: Gemma 2, arXiv 2408.00118, section 2.
    """
    return logits_NV if cap is None else logits_NV.div_(cap).tanh_().mul_(cap)


def logits(hidden_NH: Tensor, head: FrozenLinear, lora: HeadLora | None = None, cap: float | None = None) -> Tensor:
    """(N, V), float32 or wider, a tensor of its own. A row's bits do not depend on how many rows there are."""
    logits_NV = head(hidden_NH)
    if lora is not None and not keeps_bits(hidden_NH.device):
        low_NR = (hidden_NH @ lora.a.T.to(hidden_NH.dtype)) * lora.scale
        logits_NV.addmm_(low_NR, lora.b.T.to(hidden_NH.dtype))  # rounded once
    elif lora is not None:
        a_RH, b_VR = (for_products(matrix, hidden_NH) for matrix in (lora.a, lora.b))
        layout = head.exactness.adapter(padded_rank(len(a_RH)), a_RH)
        low_NR = product(layout, hidden_NH.to(a_RH.dtype), pad_rank(a_RH, 0)) * lora.scale
        logits_NV = (logits_NV + product(layout, low_NR, pad_rank(b_VR, 1))).to(logits_NV.dtype)
    return capped_(logits_NV.to(_wide(hidden_NH)), cap)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(ROWS_MIN, ELEMENTS_MAX // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _log_softmax_(logits_CV: Tensor, targets_CK: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities (C, K), normaliser (C, 1)); afterwards logits_CV / normaliser are the probabilities."""
    top_C1 = logits_CV.amax(dim=1, keepdim=True)
    chosen_CK = logits_CV.gather(1, targets_CK)
    total_C1 = row_sums(logits_CV.sub_(top_C1).exp_())
    return chosen_CK - top_C1 - total_C1.log(), total_C1


def _slope(logits_CV: Tensor, cap: float | None) -> Tensor | None:
    """The derivative of the cap, of capped logits: 1 - (l / cap)^2."""
    return None if cap is None else 1 - (logits_CV / cap).square_()


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head: FrozenLinear,
        targets_NK: Tensor,
        needed_N: NDArray[np.bool_],
        cap: float | None,
    ) -> Tensor:
        logprobs: list[Tensor] = []
        slopes: list[Tensor] = []  # (C, K), of the targets
        differentiate = ctx.needs_input_grad[0]
        mean_NH = torch.zeros_like(hidden_NH) if differentiate else hidden_NH.new_empty(0)
        chunks = _chunks(len(hidden_NH), head.outputs)
        needed = _needed_rows(needed_N, hidden_NH.device).split([int(needed_N[chunk].sum()) for chunk in chunks])
        for chunk, rows_C in zip(chunks, needed, strict=True):
            logits_CV = logits(hidden_NH[chunk], head, cap=cap)
            slope_CV = _slope(logits_CV, cap) if differentiate else None
            if slope_CV is not None:
                slopes.append(slope_CV.gather(1, targets_NK[chunk]))
            logprobs_CK, total_C1 = _log_softmax_(logits_CV, targets_NK[chunk])
            logprobs.append(logprobs_CK)
            if differentiate and len(rows_C):
                whole, rows = len(rows_C) == len(logits_CV), rows_C - chunk.start
                p_CV = logits_CV if whole else logits_CV[rows]
                p_CV = p_CV.div_(total_C1 if whole else total_C1[rows])
                if slope_CV is not None:
                    p_CV.mul_(slope_CV if whole else slope_CV[rows])
                mean_NH[rows_C] = head.back([p_CV.to(head.dtype)]).to(mean_NH.dtype)
        ctx.head, ctx.needed_N = head, needed_N
        ctx.save_for_backward(targets_NK, mean_NH, torch.cat(slopes) if slopes else None)
        return torch.cat(logprobs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad_NK,) = grads
        targets_NK, mean_NH, slope_NK = ctx.saved_tensors
        head: FrozenLinear = ctx.head
        _check_promise(grad_NK, ctx.needed_N)
        wide = grad_NK.dtype
        grad_NH = mean_NH.to(wide) * -grad_NK.sum(dim=1, keepdim=True)
        of_targets_NK = grad_NK if slope_NK is None else grad_NK * slope_NK
        for k in range(targets_NK.shape[1]):
            grad_NH.addcmul_(head.rows(targets_NK[:, k]).to(wide), of_targets_NK[:, k : k + 1])
        return grad_NH.to(mean_NH.dtype), None, None, None, None


class _AdaptedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head: FrozenLinear,
        targets_NK: Tensor,
        needed_N: NDArray[np.bool_],
        cap: float | None,
        a_RH: Tensor,
        b_VR: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.head, ctx.needed_N = head, needed_N
        ctx.save_for_backward(hidden_NH, targets_NK, a_RH, b_VR)
        ctx.scale, ctx.cap = scale, cap
        lora = HeadLora(a_RH, b_VR, scale)
        return torch.cat(
            [
                _log_softmax_(logits(hidden_NH[chunk], head, lora, cap), targets_NK[chunk])[0]
                for chunk in _chunks(len(hidden_NH), head.outputs)
            ]
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NK,) = grads
        hidden_NH, targets_NK, a_RH, b_VR = ctx.saved_tensors
        head: FrozenLinear = ctx.head
        lora = HeadLora(a_RH, b_VR, ctx.scale)
        _check_promise(grad_NK, ctx.needed_N)
        rows_M = _needed_rows(ctx.needed_N, hidden_NH.device)
        keeps = keeps_bits(hidden_NH.device) and for_products(a_RH, hidden_NH).dtype == a_RH.dtype
        back = _back if keeps else _back_in_base_dtype
        grad_hidden_NH = torch.zeros_like(hidden_NH)
        grad_a_RH, grad_b_VR = torch.zeros_like(a_RH), torch.zeros_like(b_VR)
        for chunk in _chunks(len(rows_M), head.outputs):
            rows_C = rows_M[chunk]
            h_CH, targets_CK, grad_CK = hidden_NH[rows_C], targets_NK[rows_C], grad_NK[rows_C]
            logits_CV = logits(h_CH, head, lora, ctx.cap)
            slope_CV = _slope(logits_CV, ctx.cap)
            _, total_C1 = _log_softmax_(logits_CV, targets_CK)
            grad_logits_CV = logits_CV.mul_(-grad_CK.sum(dim=1, keepdim=True) / total_C1)
            grad_logits_CV.scatter_add_(1, targets_CK, grad_CK)
            if slope_CV is not None:
                grad_logits_CV.mul_(slope_CV)
            grad_hidden_NH[rows_C] = back(grad_logits_CV, h_CH, head, lora, grad_a_RH, grad_b_VR)
        return grad_hidden_NH, None, None, None, None, grad_a_RH, grad_b_VR, None


def _back(
    grad_CV: Tensor, h_CH: Tensor, head: FrozenLinear, lora: HeadLora, grad_a_RH: Tensor, grad_b_VR: Tensor
) -> Tensor:
    """The gradient of the rows (C, H); adds those of A and B."""
    wide = grad_CV.dtype
    low_CR = h_CH.to(wide) @ lora.a.T.to(wide)
    grad_low_CR = (grad_CV @ lora.b.to(wide)).mul_(lora.scale)
    grad_b_VR.addmm_(grad_CV.T, low_CR, alpha=lora.scale)
    grad_a_RH.addmm_(grad_low_CR.T, h_CH.to(wide))
    grad_h_CH = head.back([grad_CV.to(head.dtype)]).to(wide).addmm_(grad_low_CR, lora.a.to(wide))
    return grad_h_CH.to(h_CH.dtype)


def _back_in_base_dtype(
    grad_CV: Tensor, h_CH: Tensor, head: FrozenLinear, lora: HeadLora, grad_a_RH: Tensor, grad_b_VR: Tensor
) -> Tensor:
    """`_back`, in the base's dtype; A's and B's gradients add up in float32."""
    g_CV, a_RH = grad_CV.to(head.dtype), lora.a.to(head.dtype)
    grad_low_CR = (g_CV @ lora.b.to(head.dtype)).mul_(lora.scale)
    grad_b_VR.add_(wide_product(g_CV.T, h_CH @ a_RH.T), alpha=lora.scale)
    grad_a_RH.add_(wide_product(grad_low_CR.T, h_CH))
    return head.back([g_CV]).addmm_(grad_low_CR, a_RH)


def _needed_rows(needed_N: NDArray[np.bool_], device: torch.device) -> Tensor:
    return to_device(needed_N.nonzero()[0], device)


def _check_promise(grad_NK: Tensor, needed_N: NDArray[np.bool_]) -> None:
    """On a CPU only: a GPU would have to be waited for, and the losses that promise are the same there."""
    if grad_NK.device.type == "cpu":
        idle_N1 = torch.from_numpy(~needed_N[:, None])
        assert not (grad_NK.ne(0) & idle_N1).any(), "a row that promised a zero gradient has another"
