"""Prefill of requests' prompts: computes the rows that no earlier prompt left, and caches them for later ones."""

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
    """Since the sampler started."""

    prefilled_tokens: int = 0
    reused_tokens: int = 0  # of prompts, computed for another request
    decoded_tokens: int = 0  # sampled tokens, the first of each sequence included
    prefills: int = 0  # passes over one or several prompts
    steps: int = 0  # passes of one token a sequence
    finished: int = 0  # requests
    failed: int = 0
    cancelled: int = 0
    parked: int = 0  # sequences that were parked because memory ran out
    device_s: float = 0.0  # for all of these


class Prefiller:
    """Computes prompts on one model and caches `tokens_max` tokens of earlier ones. For the device's thread only."""

    def __init__(self, model: Model, counters: SamplingCounters, tokens_max: int) -> None:
        self._model, self._counters = model, counters
        self._prefix_cache = PrefixCache(tokens_max, model.reusable)

    @property
    def cached_tokens(self) -> int:
        """Positions that cached prompts take of the memory."""
        return self._prefix_cache.tokens

    def trim(self, tokens_max: int) -> None:
        """Evict cached prompts down to `tokens_max` tokens."""
        self._prefix_cache.trim(tokens_max)

    def rows(self, group: SequenceGroup) -> int:
        """Rows of the request's prompt that must be computed."""
        return group.prompt_tokens - self._cached(group)[1]

    @torch.inference_mode()
    def compute(self, groups: Sequence[SequenceGroup]) -> list[Tensor]:
        """One pass over the missing rows of the requests' prompts. Returns each request's rows, without the reused
        ones.

        Sets `past` and `last_1H` of each request.
        """
        cached = [self._cached(group) for group in groups]
        prompts = [
            PrefillPrompt(
                group.request.prompt,
                group.lora,
                None if prompt_cached is None else prompt_cached.past,
                reused,
                images=group.images,
            )
            for group, (prompt_cached, reused) in zip(groups, cached, strict=True)
            if reused < group.prompt_tokens
        ]
        computed = iter(self._model.prefill(prompts) if prompts else ())
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
                positions = self._model.kept_positions(past, group.prompt_tokens)
                self._prefix_cache.add(
                    group.request.adapter, group.request.prompt, past, group.last_1H, positions, group.images
                )
            group.past = past if group.decodes else None
            group.past_positions = self._model.kept_positions(past, group.prompt_tokens)
            self._counters.prefilled_tokens += rows_computed
            self._counters.reused_tokens += group.prompt_tokens - rows_computed
            if first:
                group.reused = group.prompt_tokens - rows_computed
        return rows

    @torch.inference_mode()
    def recompute(self, sequences: Sequence[RunningSequence]) -> list[Any]:
        """Recompute keys and values of parked sequences, all tokens but the last, in one pass."""
        prompts = [
            PrefillPrompt(
                sequence.fed_T, sequence.group.lora, drawn=len(sequence.tokens) - 1, images=sequence.group.images
            )
            for sequence in sequences
        ]
        prefilled = self._model.prefill(prompts)
        self._counters.prefills += 1
        self._counters.prefilled_tokens += sum(prompt.computed for prompt in prefilled)
        return [prompt.past for prompt in prefilled]

    def _cached(self, group: SequenceGroup) -> tuple[CachedPrompt | None, int]:
        """The cached prompt with the longest common prefix, and how many of its tokens the request can reuse."""
        request = group.request
        return self._prefix_cache.find(request.adapter, request.prompt, group.reusable, group.images) or (None, 0)
