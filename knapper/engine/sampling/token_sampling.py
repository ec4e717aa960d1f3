"""From logits to tokens: the sampling distribution, and a draw from it that depends on its own row alone.

N rows, V vocabulary, k alternatives or draws. Everything is float32 but the cumulative sums, which are float64.
Sources: top-k, arXiv 1805.04833; top-p (nucleus), arXiv 1904.09751.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.row_padding import padded, row_sums
from knapper.engine.transfer import to_device
from knapper.wire.types import SamplingParams

empty_token, empty_logprob = 0, -99999.0  # an empty cell of top-k log-probabilities
_BLOCK: Final = 256  # tokens of one partial sum of the cumulative distribution
_TOP_P_FIRST: Final = 1024  # values that top-p looks at before it sorts the whole vocabulary


def uniforms(seed: int, sample: int) -> np.random.Generator:
    """The generator of a request's sample: one number in [0, 1) for each token that it draws."""
    return _generator(f"{seed}:{sample}")


def prompt_uniforms(seed: int, rows: int, k: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Numbers (rows, k) in [0, 1) that draw alternatives to a prompt's tokens; independent of `uniforms`."""
    return _generator(f"{seed}:prompt").random((rows, k))


def _generator(of: str) -> np.random.Generator:
    key = hashlib.blake2b(of.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


@dataclass(frozen=True)
class SampledTokens:
    """`logprobs_NV`: of the sampling distribution; -inf for tokens that top_k or top_p removed."""

    tokens_N: Tensor
    logprobs_NV: Tensor

    @property
    def logprobs_N(self) -> Tensor:
        return self.logprobs_NV.gather(1, self.tokens_N[:, None])[:, 0]


def draw(logits_NV: Tensor, params: list[SamplingParams], uniforms_N: list[float]) -> SampledTokens:
    """One token a row, by inverse transform: the first id whose cumulative probability exceeds the row's number.

    The log-probabilities are those of the sampling distribution: tempered, and after top_k and top_p renormalised over
    the remaining tokens, so that exp(logprob) is the probability with which the token was drawn and importance ratios
    are exact. A greedy row (temperature 0) takes the likeliest token, the lowest id among equals; its distribution
    would be a certainty, so its log-probabilities are the untempered ones. `logits_NV` must be finite. A row's result
    does not depend on other rows.
    """
    logits_NV = where_float64(logits_NV)
    device = logits_NV.device
    temperatures = [p.temperature or 1.0 for p in params]
    tempered = any(temperature != 1.0 for temperature in temperatures)
    logprobs_NV = log_distribution(logits_NV, to_device(temperatures, device, torch.float64) if tempered else None)
    cut = [row for row, p in enumerate(params) if p.temperature > 0 and (p.top_k != -1 or p.top_p < 1)]
    if cut:
        rows = to_device(cut, device)
        vocabulary = logits_NV.shape[1]
        top_k = [vocabulary if params[row].top_k == -1 else min(params[row].top_k, vocabulary) for row in cut]
        top_p = [params[row].top_p for row in cut]
        logprobs_NV[rows] = _truncated(logprobs_NV[rows], top_k, top_p)
    tokens_N = _inverse(logprobs_NV, to_device(uniforms_N, device, torch.float64)[:, None])[:, 0]
    greedy = [p.temperature == 0 for p in params]
    if any(greedy):
        tokens_N = torch.where(to_device(greedy, device), logits_NV.argmax(-1), tokens_N)
    return SampledTokens(tokens_N, logprobs_NV)


def finite_rows(values_NV: Tensor) -> Tensor:
    """Whether every number of a row is finite (N, 1). A NaN, too, is the least and the greatest of its row."""
    return values_NV.amin(-1, keepdim=True).isfinite() & values_NV.amax(-1, keepdim=True).isfinite()


def where_float64(logits_NV: Tensor) -> Tensor:
    """The logits on a device with float64: mps has none, and shares its memory with the CPU."""
    return logits_NV.cpu() if logits_NV.device.type == "mps" else logits_NV


def redraw(logits_NV: Tensor, temperature: float, uniforms_Nk: Tensor) -> Tensor:
    """k independent tokens a row (N, k), from the whole distribution at the temperature; at 0 the likeliest token."""
    if temperature == 0:
        return logits_NV.argmax(-1, keepdim=True).expand(uniforms_Nk.shape)
    temperature_N = torch.full((len(logits_NV),), temperature, dtype=torch.float64, device=logits_NV.device)
    return _inverse(log_distribution(logits_NV, temperature_N), uniforms_Nk)


def alternatives(logprobs_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row and their log-probabilities (N, k), in order; removed ones are empty."""
    values, tokens = logprobs_NV.topk(min(k, logprobs_NV.shape[1]), dim=-1)
    gone = values == -torch.inf
    values, tokens = values.masked_fill(gone, empty_logprob), tokens.masked_fill(gone, empty_token)
    missing = k - values.shape[1]
    return F.pad(tokens, (0, missing), value=empty_token), F.pad(values, (0, missing), value=empty_logprob)


def log_distribution(logits_NV: Tensor, temperature_N: Tensor | None = None) -> Tensor:
    """Log-probabilities (N, V) of softmax(logits / temperature); temperature 1 where none is given."""
    # The largest logit becomes 0 first: a small temperature then sends the others to -inf and never makes a NaN.
    shifted = logits_NV - logits_NV.amax(-1, keepdim=True)
    scaled = shifted if temperature_N is None else shifted.div_(temperature_N[:, None].float())
    # The operations of `head` in training, in the same order.
    return scaled.sub_(row_sums(scaled.exp()).log())


def _truncated(logprobs_NV: Tensor, top_k: list[int], top_p: list[float]) -> Tensor:
    """Renormalised over the smallest set of likeliest tokens that holds `top_p` of the mass of the `top_k` likeliest.

    Among equals the lower ids stay.
    """
    rows, vocabulary = logprobs_NV.shape
    p_NV = padded(logprobs_NV.exp())
    missing = p_NV.shape[0] - rows
    top_k_N = to_device(top_k + [1] * missing, p_NV.device)
    top_p_N = to_device(top_p + [0.0] * missing, p_NV.device, torch.float64)
    likeliest, cumulative = _likeliest(p_NV, top_k_N, top_p_N)
    last = top_k_N.clamp(max=cumulative.shape[1])[:, None] - 1
    mass = torch.where(top_k_N == vocabulary, 1.0, cumulative.gather(1, last)[:, 0])
    before = F.pad(cumulative, (1, -1))
    nucleus = torch.where(top_p_N < 1, (before < (top_p_N * mass)[:, None]).sum(-1).clamp(min=1), vocabulary)
    size_N = torch.minimum(top_k_N, nucleus)
    edge = likeliest.gather(1, size_N[:, None] - 1)
    above, tied = p_NV > edge, p_NV == edge
    ties_N = size_N - above.sum(-1)
    mask_NV = above | (tied & (tied.cumsum(-1) <= ties_N[:, None]))
    return F.log_softmax(padded(logprobs_NV).masked_fill(~mask_NV, -torch.inf), dim=-1)[:rows]


def _likeliest(p_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probabilities of each row in order, as many as top_k and top_p need, and their cumulative sums."""
    first = min(_TOP_P_FIRST, p_NV.shape[1])
    if p_NV.device.type == "cpu":  # elsewhere sorting costs less than waiting to know whether it is needed
        likeliest = p_NV.topk(first, dim=-1).values
        cumulative = likeliest.cumsum(-1, dtype=torch.float64)
        enough = (top_k_N <= first) | ((cumulative[:, -1] >= top_p_N) & (top_p_N < 1))
        if bool(enough.all()):
            return likeliest, cumulative
    likeliest = p_NV.sort(dim=-1, descending=True).values
    return likeliest, likeliest.cumsum(-1, dtype=torch.float64)


def _inverse(logprobs_NV: Tensor, uniforms_Nk: Tensor) -> Tensor:
    """(N, k): for each number the first id whose cumulative probability exceeds it."""
    rows, vocabulary = logprobs_NV.shape
    p_NV = F.pad(logprobs_NV.exp(), (0, -vocabulary % _BLOCK))
    blocks = p_NV.view(rows, -1, _BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms_Nk * total, torch.nextafter(total, torch.zeros_like(total)))
    block = torch.searchsorted(cumulative, target, right=True)
    start = F.pad(cumulative, (1, 0)).gather(1, block)
    block_p = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).double()
    within = torch.searchsorted(start[:, :, None] + block_p.cumsum(-1), target[:, :, None], right=True)[:, :, 0]
    # Rounding may leave the block's end just short of the target: its last token with any probability is then right.
    last = (_BLOCK - 1) - (block_p.flip(-1) > 0).int().argmax(-1)
    return block * _BLOCK + torch.minimum(within, last)
