"""From the logits of several sequences to one token each. N sequences, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from knapper.engine.sampling import grammar
from knapper.engine.sampling.sequence import RunningSequence, SequenceGroup
from knapper.engine.sampling.token_sampling import alternatives, draw, finite_rows, where_float64
from knapper.errors import UserError


class NonFiniteLogits(UserError):
    """The weights give non-finite logits: no token can be drawn."""

    code = "non_finite"

    @classmethod
    def of(cls, group: SequenceGroup) -> "NonFiniteLogits":
        weights = f"adapter {group.request.adapter}" if group.request.adapter else f"model {group.request.base_model}"
        return cls(f"{weights} gives logits that are not finite: broken weights. Use an earlier checkpoint")


def take_tokens(sequences: Sequence[RunningSequence], logits_NV: Tensor) -> dict[SequenceGroup, Exception]:
    """Draw a token for each sequence. Returns the requests that fail, with their errors; their sequences take none.

    May overwrite the logits.
    """
    finite = finite_rows(logits_NV)
    if logits_NV.device.type != "cpu" or not bool(finite.all()):  # on a GPU, to ask would be to wait
        logits_NV = torch.where(finite, logits_NV, 0.0)
    broken = grammar.mask(sequences, logits_NV)
    drawn = draw(
        logits_NV,
        [sequence.group.request.params for sequence in sequences],
        [t.uniform() for t in sequences],
    )
    k_max = max(sequence.group.request.topk_sample_logprobs for sequence in sequences)
    likeliest = [cells.cpu() for cells in alternatives(drawn.logprobs_NV, k_max)] if k_max else None
    failures: dict[SequenceGroup, Exception] = {}
    for row, (sequence, token, logprob, is_finite) in enumerate(
        zip(sequences, *_on_host(drawn.tokens_N, drawn.logprobs_N, where_float64(finite[:, 0])), strict=True)
    ):
        if not is_finite:
            failures[sequence.group] = NonFiniteLogits.of(sequence.group)
        elif row in broken:
            failures.setdefault(sequence.group, broken[row])
        if sequence.group in failures:
            continue
        k = sequence.group.request.topk_sample_logprobs
        topk = (likeliest[0][row, :k], likeliest[1][row, :k]) if likeliest is not None and k else None
        try:
            sequence.take(token, logprob, topk)
        except Exception as error:  # noqa: BLE001  raised by its listener, stop criteria or grammar: fails this request only
            failures[sequence.group] = error
    return failures


def _on_host(tokens_N: Tensor, logprobs_N: Tensor, finite_N: Tensor) -> tuple[list[int], list[float], list[bool]]:
    """In one transfer, as float64: it holds every token and every float32 exactly."""
    tokens, logprobs, finite = torch.stack([values.double() for values in (tokens_N, logprobs_N, finite_N)]).tolist()
    return [int(token) for token in tokens], logprobs, [bool(value) for value in finite]
