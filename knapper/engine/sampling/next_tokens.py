"""From the logits of several texts to a token of each. N texts, V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from knapper.engine.sampling.sequence import RunningSequence, SequenceGroup
from knapper.engine.sampling.token_sampling import alternatives, draw
from knapper.errors import UserError


class NonFiniteLogits(UserError):
    """The weights give logits that are not numbers: nothing can be drawn from them."""

    code = "non_finite"

    @classmethod
    def of(cls, job: SequenceGroup) -> "NonFiniteLogits":
        weights = f"adapter {job.request.adapter}" if job.request.adapter else f"model {job.request.base_model}"
        return cls(f"{weights} gives logits that are not finite: broken weights. Use an earlier checkpoint")


def take_tokens(texts: Sequence[RunningSequence], logits_NV: Tensor) -> dict[SequenceGroup, Exception]:
    """Each text takes a token, but those of jobs that fail by it: returned, with what is wrong."""
    finite = logits_NV.isfinite().all(-1, keepdim=True)
    drawn = draw(
        torch.where(finite, logits_NV, 0.0), [text.job.request.params for text in texts], [t.uniform() for t in texts]
    )
    widest = max(text.job.request.topk_sample_logprobs for text in texts)
    likeliest = alternatives(drawn.logprobs_NV, widest) if widest else None
    failed: dict[SequenceGroup, Exception] = {}
    for row, (text, token, logprob, fine) in enumerate(
        zip(texts, drawn.tokens_N.tolist(), drawn.logprobs_N.tolist(), finite[:, 0].tolist(), strict=True)
    ):
        if not fine:
            failed[text.job] = NonFiniteLogits.of(text.job)
        if text.job in failed:
            continue
        k = text.job.request.topk_sample_logprobs
        topk = (likeliest[0][row, :k], likeliest[1][row, :k]) if likeliest is not None and k else None
        try:
            text.take(token, logprob, topk)
        except Exception as error:  # noqa: BLE001  of who listens to it, or of its stops: nobody else's affair
            failed[text.job] = error
    return failed
