"""How far the trainer is from the sampler that drew a request's tokens: numbers of a finished pass, on the host.

They are made of the log-probabilities that the request brought and those that the pass returns, and touch no tensor of
the pass. T tokens of a datum, S sampled tokens of a request.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knapper.wire.types import Datum

_EXPONENT_MAX = 60.0  # a ratio stays finite in float32, so that every metric can be sent


def metrics(data: Sequence[Datum], outputs: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, float]:
    """Of the sampled tokens: those whose `logprobs` are not 0, as they are at a prompt's. Empty if there are none.

    `kl_sample_train_v1` and `_v2` are the estimators k1 and k2 of J. Schulman, http://joschu.net/blog/kl-approx.html,
    of KL(sampler, trainer): unlike the losses' `kl` they count tokens of advantage 0 too. `entropy` is the sampler's,
    estimated by the tokens that it drew. Reductions are those by which the SDK joins the parts of a split batch.
    """
    both = zip(data, outputs, strict=True)
    pairs = [(datum.inputs["logprobs"], output["logprobs"]) for datum, output in both if "logprobs" in datum.inputs]
    if not pairs:
        return {}
    sampler_S = np.concatenate([sampler_T.ravel() for sampler_T, _ in pairs]).astype(np.float64)
    trainer_S = np.concatenate([trainer_T.ravel() for _, trainer_T in pairs]).astype(np.float64)
    sampled = sampler_S != 0.0
    if not sampled.any():
        return {}
    sampler_S, distance_S = sampler_S[sampled], (trainer_S - sampler_S)[sampled]
    ratio_S = np.exp(np.clip(distance_S, -_EXPONENT_MAX, _EXPONENT_MAX))
    low, high = np.quantile(ratio_S, (0.01, 0.99))
    groups, degenerate = _groups(data)
    return {
        "sampled_tokens:sum": float(sampler_S.size),
        "kl_sample_train_v1:sum": float(-distance_S.sum()),
        "kl_sample_train_v2:sum": float(0.5 * (distance_S**2).sum()),
        "entropy:sum": float(-sampler_S.sum()),
        "ratio_p01:min": float(low),
        "ratio_p99:max": float(high),
        "groups:sum": float(groups),
        "degenerate_groups:sum": float(degenerate),
    }


def _groups(data: Sequence[Datum]) -> tuple[int, int]:
    """(groups, those without any advantage): datums of one prompt, where there are at least two."""
    taught: dict[bytes, list[bool]] = defaultdict(list)
    for datum in data:
        logprobs_T, advantages_T = datum.inputs.get("logprobs"), datum.inputs.get("advantages")
        if logprobs_T is None or advantages_T is None or not logprobs_T.any():
            continue
        prompt = datum.tokens[: int(np.argmax(logprobs_T != 0.0)) + 1]
        taught[prompt.tobytes()].append(bool(advantages_T.any()))
    groups = [members for members in taught.values() if len(members) > 1]
    return len(groups), sum(not any(members) for members in groups)
