"""The prompt log-probabilities of a request: what to ask vLLM for, and its answer as fields of SampleOutput.

P prompt tokens, k alternatives. Token 0 has no score. Log-probabilities are untempered.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from knapper.engine.sampling.token_sampling import empty_logprob, empty_token
from knapper.vllm.core import TokenDelta, Top
from knapper.wire.types import SampleRequest, TopK


def alternatives_of(request: SampleRequest) -> int | None:
    """Alternatives that vLLM must return for each prompt token; None without prompt scores."""
    requested = request.prompt_logprobs or request.topk_prompt_logprobs
    return request.topk_prompt_logprobs if requested else None


def prompt_fields(request: SampleRequest, delta: TokenDelta) -> dict[str, Any]:
    """Fields of SampleOutput."""
    fields: dict[str, Any] = {}
    if delta.prompt is not None:
        first = 1
        if request.prompt_logprobs_last_n is not None:
            first = int(request.prompt.size) - request.prompt_logprobs_last_n
        rows = [row if position >= first else None for position, row in enumerate(delta.prompt)]
        if request.prompt_logprobs:
            fields["prompt_logprobs"] = np.array([np.nan if row is None else row[0] for row in rows], dtype=np.float32)
        if k := request.topk_prompt_logprobs:
            fields["topk_prompt_logprobs"] = table([[] if row is None else row[1] for row in rows], k)
    return fields


def table(tops: Sequence[Top], k: int) -> TopK:
    """(N, k), with empty cells where a row has fewer."""
    tokens = np.full((len(tops), k), empty_token, dtype=np.int32)
    logprobs = np.full((len(tops), k), empty_logprob, dtype=np.float32)
    for row, top in enumerate(tops):
        for column, (token, logprob) in enumerate(top[:k]):
            tokens[row, column], logprobs[row, column] = token, logprob
    return TopK(tokens, logprobs)
