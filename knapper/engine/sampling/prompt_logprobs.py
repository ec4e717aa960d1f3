"""The prompt log-probabilities that a request asks for, filled range by range as rows of logits are computed.

P prompt tokens, N rows, V vocabulary, k alternatives, K targets a position. Row j scores token j + 1; token 0 has no
score, nor has what stands for an image. Log-probabilities are untempered.
"""

from dataclasses import replace

import numpy as np
from torch import Tensor

from knapper.engine.sampling.token_sampling import (
    alternatives,
    empty_logprob,
    log_distribution,
    prompt_uniforms,
    redraw,
    where_float64,
)
from knapper.engine.transfer import to_device
from knapper.wire.types import Cells, Float32, PromptDraws, SampleRequest, TopK


class PromptLogprobs:
    """The prompt scores of one request; None where it does not ask."""

    def __init__(self, request: SampleRequest) -> None:
        self._request = request
        tokens, k = int(request.prompt.size), request.topk_prompt_logprobs
        last_n = request.prompt_logprobs_last_n
        self._first_logprob = 0 if last_n is None else tokens - 1 - last_n
        self.logprobs: Float32 | None = None
        self.topk: TopK | None = None
        self.targets: Cells | None = None
        self.draws: PromptDraws | None = None
        if request.prompt_logprobs:
            self.logprobs = np.full(tokens, np.nan, dtype=np.float32)
        if k:
            empty = np.full((tokens, k), empty_logprob, dtype=np.float32)
            self.topk = TopK(np.zeros((tokens, k), dtype=np.int32), empty)
        if (requested := request.target_prompt_logprobs) is not None:
            self.targets = replace(requested, values=np.zeros(requested.values.shape, dtype=np.float32))
            self._target_rows = requested.rows()
        if k := request.prompt_alt_tokens_k:
            self._uniforms = prompt_uniforms(request.seed, tokens - 1, k)
            drawn = np.zeros((tokens - 1, k), dtype=np.int64), np.zeros((tokens - 1, k), dtype=np.float32)
            self.draws = PromptDraws(*drawn)

    @staticmethod
    def is_requested(request: SampleRequest) -> bool:
        return bool(
            request.prompt_logprobs
            or request.topk_prompt_logprobs
            or request.target_prompt_logprobs is not None
            or request.prompt_alt_tokens_k
        )

    @property
    def first(self) -> int:
        """The first row that is needed: earlier rows need not be added."""
        firsts = [int(self._request.prompt.size) - 1]
        if self.logprobs is not None or self.topk is not None:
            firsts.append(self._first_logprob)
        if self._request.target_prompt_logprobs is not None:
            firsts.append(int(self._target_rows[self._request.target_prompt_logprobs.values >= 0].min()))
        if self.draws is not None:
            firsts.append(0)
        return min(firsts)

    def add(self, start: int, logits_NV: Tensor) -> None:
        """Add the rows from `start` on; their logits are finite."""
        logits_NV = where_float64(logits_NV)
        logprobs_NV = log_distribution(logits_NV)
        stop = start + len(logits_NV)
        if (skipped := max(start, self._first_logprob)) < stop:
            self._add_logprobs(skipped, logprobs_NV[skipped - start :])
        if self.targets is not None:
            self._add_targets(start, stop, logprobs_NV)
        if self.draws is not None:
            device = logits_NV.device
            uniforms_Nk = to_device(self._uniforms[start:stop], device)
            tokens_Nk = redraw(logits_NV, self._request.params.temperature, uniforms_Nk)
            self.draws.tokens[start:stop] = tokens_Nk.cpu().numpy()
            self.draws.logprobs[start:stop] = logprobs_NV.gather(1, tokens_Nk).cpu().numpy()

    def _add_logprobs(self, start: int, logprobs_NV: Tensor) -> None:
        positions = slice(start + 1, start + 1 + len(logprobs_NV))
        if self.logprobs is not None:
            following = to_device(self._request.prompt[positions].astype(np.int64), logprobs_NV.device)
            self.logprobs[positions] = logprobs_NV.gather(1, following[:, None])[:, 0].cpu().numpy()
            for image in self._request.images:
                self.logprobs[image.at : image.at + image.tokens] = np.nan
        if self.topk is not None:
            tokens, logprobs = alternatives(logprobs_NV, self._request.topk_prompt_logprobs)
            self.topk.tokens[positions], self.topk.logprobs[positions] = tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _add_targets(self, start: int, stop: int, logprobs_NV: Tensor) -> None:
        assert self.targets is not None
        assert self._request.target_prompt_logprobs is not None
        low, high = np.searchsorted(self._target_rows, [start, stop])
        tokens = self._request.target_prompt_logprobs.values[low:high]
        requested = np.flatnonzero(tokens >= 0)
        rows, columns = (
            to_device(indices, logprobs_NV.device)
            for indices in (self._target_rows[low:high][requested] - start, tokens[requested])
        )
        logprobs = logprobs_NV[rows, columns]
        self.targets.values[low + requested] = logprobs.cpu().numpy()
