"""The prompts of requests: which rows have to be computed, and what is kept of them for later ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knapper.engine.models.base import Model
from knapper.engine.models.prefill import PrefillPrompt
from knapper.engine.sampling.prefix_cache import Beginning, PrefixCache
from knapper.engine.sampling.sequence import RunningSequence, SequenceGroup


@dataclass
class SamplingCounters:
    """Since the sampler began."""

    prefilled_tokens: int = 0
    reused_tokens: int = 0  # of prompts, that another request had computed
    decoded_tokens: int = 0  # sampled ones, the first of each text included
    prefills: int = 0  # passes, of one or several prompts
    steps: int = 0  # passes of one token a text
    finished: int = 0  # requests
    failed: int = 0
    cancelled: int = 0
    parked: int = 0  # texts that had to wait, after they had begun, because memory ran out
    device_s: float = 0.0  # of the device, for all of these


class Prefiller:
    """Computes prompts on one model; `tokens_max` of earlier ones are kept at most. For the device's thread only."""

    def __init__(self, model: Model, counters: SamplingCounters, tokens_max: int) -> None:
        self._model, self._counters = model, counters
        self._beginnings = PrefixCache(tokens_max, partly=model.continues)

    @property
    def kept(self) -> int:
        """Tokens of earlier prompts."""
        return self._beginnings.tokens

    def trim(self, tokens_max: int) -> None:
        """Keep no more than so many tokens of earlier prompts."""
        self._beginnings.trim(tokens_max)

    def rows(self, job: SequenceGroup) -> int:
        """How many rows the job's prompt takes."""
        return job.prompt_tokens - self._found(job)[1]

    @torch.inference_mode()
    def compute(self, jobs: Sequence[SequenceGroup]) -> list[Tensor]:
        """One pass over what is not there yet of the jobs' prompts: the rows of each, without those that it reused.

        The jobs have then what their texts begin with.
        """
        found = [self._found(job) for job in jobs]
        fresh = [
            PrefillPrompt(job.request.prompt, job.lora, None if beginning is None else beginning.kept, reused)
            for job, (beginning, reused) in zip(jobs, found, strict=True)
            if reused < job.prompt_tokens
        ]
        computed = iter(self._model.prompts(fresh) if fresh else ())
        self._counters.prefills += bool(fresh)
        rows: list[Tensor] = []
        for job, (beginning, reused) in zip(jobs, found, strict=True):
            first = job.last_1H is None
            if beginning is not None and reused == job.prompt_tokens:
                job.last_1H, kept, new = beginning.last_1H, beginning.kept, 0
                rows.append(beginning.last_1H[:0])
            else:
                made = next(computed)
                job.last_1H, kept, new = made.rows[-1:].clone(), made.kept, made.computed
                rows.append(made.rows)
                self._beginnings.add(job.request.adapter, job.request.prompt, kept, job.last_1H)
            job.kept = kept if job.cost else None
            self._counters.prefilled_tokens += new
            self._counters.reused_tokens += job.prompt_tokens - new
            if first:
                job.reused = job.prompt_tokens - new
        return rows

    @torch.inference_mode()
    def again(self, texts: Sequence[RunningSequence]) -> list[Any]:
        """What each text had before it was parked, all but its last token: one pass over the texts so far."""
        prompts = [PrefillPrompt(text.fed_T, text.job.lora, drawn=len(text.tokens) - 1) for text in texts]
        made = self._model.prompts(prompts)
        self._counters.prefills += 1
        self._counters.prefilled_tokens += sum(each.computed for each in made)
        return [each.kept for each in made]

    def _found(self, job: SequenceGroup) -> tuple[Beginning | None, int]:
        """An earlier prompt that this job's begins like, and how many tokens of it are of use."""
        return self._beginnings.find(job.request.adapter, job.request.prompt, job.reusable) or (None, 0)
