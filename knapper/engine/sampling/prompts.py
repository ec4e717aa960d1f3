"""The prompts of requests: which rows have to be computed, and what is kept of them for later ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from knapper.engine.models.base import Model
from knapper.engine.models.prefill import PrefillPrompt
from knapper.engine.sampling.prefix_cache import CachedPrompt, PrefixCache
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
        self._prefix_cache = PrefixCache(tokens_max, partial=model.continues)

    @property
    def cached_tokens(self) -> int:
        """Tokens of earlier prompts."""
        return self._prefix_cache.tokens

    def trim(self, tokens_max: int) -> None:
        """Keep no more than so many tokens of earlier prompts."""
        self._prefix_cache.trim(tokens_max)

    def rows(self, group: SequenceGroup) -> int:
        """How many rows the job's prompt takes."""
        return group.prompt_tokens - self._cached(group)[1]

    @torch.inference_mode()
    def compute(self, groups: Sequence[SequenceGroup]) -> list[Tensor]:
        """One pass over what is not there yet of the jobs' prompts: the rows of each, without those that it reused.

        The jobs have then what their texts begin with.
        """
        cached = [self._cached(group) for group in groups]
        prompts = [
            PrefillPrompt(
                group.request.prompt, group.lora, None if prompt_cached is None else prompt_cached.past, reused
            )
            for group, (prompt_cached, reused) in zip(groups, cached, strict=True)
            if reused < group.prompt_tokens
        ]
        computed = iter(self._model.prompts(prompts) if prompts else ())
        self._counters.prefills += bool(prompts)
        rows: list[Tensor] = []
        for group, (prompt_cached, reused) in zip(groups, cached, strict=True):
            first = group.last_1H is None
            if prompt_cached is not None and reused == group.prompt_tokens:
                group.last_1H, past, rows_computed = prompt_cached.last_1H, prompt_cached.past, 0
                rows.append(prompt_cached.last_1H[:0])
            else:
                prefilled = next(computed)
                group.last_1H, past, rows_computed = prefilled.rows[-1:].clone(), prefilled.past, prefilled.computed
                rows.append(prefilled.rows)
                self._prefix_cache.add(group.request.adapter, group.request.prompt, past, group.last_1H)
            group.past = past if group.cost else None
            self._counters.prefilled_tokens += rows_computed
            self._counters.reused_tokens += group.prompt_tokens - rows_computed
            if first:
                group.reused = group.prompt_tokens - rows_computed
        return rows

    @torch.inference_mode()
    def recompute(self, sequences: Sequence[RunningSequence]) -> list[Any]:
        """What each text had before it was parked, all but its last token: one pass over the texts so far."""
        prompts = [
            PrefillPrompt(sequence.fed_T, sequence.group.lora, drawn=len(sequence.tokens) - 1) for sequence in sequences
        ]
        made = self._model.prompts(prompts)
        self._counters.prefills += 1
        self._counters.prefilled_tokens += sum(each.computed for each in made)
        return [each.past for each in made]

    def _cached(self, group: SequenceGroup) -> tuple[CachedPrompt | None, int]:
        """An earlier prompt that this job's begins like, and how many tokens of it are of use."""
        return self._prefix_cache.find(group.request.adapter, group.request.prompt, group.reusable) or (None, 0)
