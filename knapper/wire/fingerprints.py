"""Fingerprints of sampled tokens: the same of a sample and of a datum that trains on it.

A fingerprint is a hash of the first tokens of a completion with their log-probabilities, both bit for bit. A client
sends both back in a pass (`target_tokens` and `logprobs`), behind a prompt whose log-probabilities are 0, and often
cut at its end: so only the beginning counts. T tokens of a datum, N of a completion.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from knapper.errors import UserError
from knapper.wire import descriptor, scan, tensors

_TOKENS_MAX: Final = 8  # of a run of tokens, from its first on
BYTES: Final = 8  # of a fingerprint
Fingerprint = bytes


@dataclass(frozen=True)
class PassContent:
    """What a forward_backward trains on.

    `digest`: of its data and loss. `sampled`: of each datum that has log-probabilities, its fingerprints, one a turn.
    """

    loss: str
    digest: bytes
    sampled: tuple[tuple[Fingerprint, ...], ...] = ()


def of_response(response: bytes) -> list[Fingerprint]:
    """Of each completion of an encoded SampleResponse that has one. Raises UserError."""
    found = []
    for tokens, logprobs in scan.sampled(response):
        runs = _of_runs(np.frombuffer(tokens, "<i4"), np.frombuffer(logprobs, "<f4"))
        found += runs[:1]
    return found


def of_pass(body: bytes) -> PassContent | None:
    """Of an encoded forward_backward that differentiates; None for one that only computes. Raises UserError."""
    request = descriptor.ForwardBackwardRequest.FromString(body)
    if request.forward_only:
        return None
    digest = hashlib.blake2b(request.loss_fn.encode(), digest_size=16)
    sampled = []
    for datum in request.data:
        digest.update(datum.SerializeToString(deterministic=True))
        if "logprobs" in datum.loss_fn_inputs and "target_tokens" in datum.loss_fn_inputs:
            sampled.append(_of_datum(datum.loss_fn_inputs))
    return PassContent(request.loss_fn, digest.digest(), tuple(sampled))


def _of_datum(inputs: Any) -> tuple[Fingerprint, ...]:
    """Empty for arrays that are wrong: the trainer says so."""
    try:
        logprobs_T = tensors.decode(inputs["logprobs"], "logprobs")
        targets_T = tensors.decode(inputs["target_tokens"], "target_tokens")
    except UserError:
        return ()
    if logprobs_T.ndim != 1 or logprobs_T.shape != targets_T.shape or logprobs_T.dtype.kind != "f":
        return ()
    return tuple(_of_runs(targets_T, logprobs_T))


def _of_runs(tokens_N: NDArray[Any], logprobs_N: NDArray[Any]) -> list[Fingerprint]:
    """Of each run of tokens whose log-probabilities are not 0. (A token that was certain has 0, and ends a run.)"""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], logprobs_N != 0, [False]]).astype(np.int8)))
    found = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        cut = slice(start, min(end, start + _TOKENS_MAX))
        content = tokens_N[cut].astype("<i4").tobytes() + logprobs_N[cut].astype("<f4").tobytes()
        found.append(hashlib.blake2b(content, digest_size=BYTES).digest())
    return found
