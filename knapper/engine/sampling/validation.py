"""Validation of sample requests. Every refusal names the field, the value and what is allowed."""

import math

import numpy as np

from knapper import limits
from knapper.engine.layers.lora import Lora
from knapper.engine.models.config import Facts
from knapper.errors import ContextLengthExceeded, InvalidField, TooLarge, UserError
from knapper.wire.types import SampleRequest


def check(request: SampleRequest, config: Facts) -> None:
    """Raises InvalidField, or ContextLengthExceeded."""
    _check_prompt(request, config)
    _between("num_samples", request.num_samples, 1, limits.num_samples_max)
    _between("topk_prompt_logprobs", request.topk_prompt_logprobs, 0, limits.top_logprobs_max)
    _between("topk_sample_logprobs", request.topk_sample_logprobs, 0, limits.top_logprobs_max)
    _between("prompt_alt_tokens_k", request.prompt_alt_tokens_k, 0, limits.top_logprobs_max)
    _check_scores(request, config)
    params = request.params
    if params.max_tokens is not None and params.max_tokens < 0:
        raise InvalidField(
            "sampling_params.max_tokens", params.max_tokens, "0 or more, or none for up to the context's end"
        )
    if not 0 <= params.temperature <= limits.temperature_max:  # a NaN is in no range
        allowed = (
            f"0 to {limits.temperature_max:g}; up to {limits.greedy_temperature_max:g} the likeliest token is taken"
        )
        raise InvalidField("sampling_params.temperature", params.temperature, allowed)
    if not (math.isfinite(params.top_p) and 0 < params.top_p <= 1):
        raise InvalidField("sampling_params.top_p", params.top_p, "above 0, up to 1")
    if params.top_k != -1 and params.top_k < 1:
        raise InvalidField("sampling_params.top_k", params.top_k, "-1 (all), or 1 or more")
    _check_stops(request, config)
    if request.grammar and params.ignore_eos:
        raise InvalidField("ignore_eos", True, "false with a grammar: where it ends, the text ends")


def check_adapter(adapter: str, lora: Lora, config: Facts) -> None:
    """Raises UserError for an adapter of another model."""
    targets = {target.name: target for target in config.lora_targets}
    for name, a in lora.a.items():
        if name not in targets:
            raise UserError(f"adapter {adapter} has the target module {name}, which the model does not have")
        b, target = lora.b[name], targets[name]
        if (tuple(a.shape), tuple(b.shape)) != target.shapes(a.shape[-2]):
            raise UserError(
                f"adapter {adapter}: target module {name} maps {a.shape[-1]} to {b.shape[-2]}; "
                f"the model's maps {target.inputs} to {target.outputs}. It was trained on another model"
            )


def _check_prompt(request: SampleRequest, config: Facts) -> None:
    prompt = request.prompt
    if prompt.ndim != 1 or prompt.size == 0:
        raise InvalidField("prompt", list(prompt.shape), "a list of at least one token")
    wrong = np.flatnonzero((prompt < 0) | (prompt >= config.vocab_size))
    if wrong.size:
        position = int(wrong[0])
        allowed = f"token ids 0 to {config.vocab_size - 1} (the vocabulary has {config.vocab_size})"
        raise InvalidField(f"prompt[{position}]", int(prompt[position]), allowed)
    ContextLengthExceeded.check(int(prompt.size), request.params.max_tokens, config.context)


def _check_scores(request: SampleRequest, config: Facts) -> None:
    rows = int(request.prompt.size) - 1
    last_n, targets = request.prompt_logprobs_last_n, request.target_prompt_logprobs
    if last_n is not None and not 1 <= last_n <= rows:
        raise InvalidField("prompt_logprobs_last_n", last_n, f"1 to {rows}, the prompt's tokens after the first")
    if request.prompt_alt_tokens_k and not rows:
        raise InvalidField("prompt_alt_tokens_k", request.prompt_alt_tokens_k, "0, as the prompt is one token")
    if targets is None:
        return
    if targets.shape[0] != rows:
        allowed = f"({rows}, K): a row for each token of the prompt after the first"
        raise InvalidField("target_prompt_logprobs.shape", list(targets.shape), allowed)
    if targets.values.size > limits.prompt_targets_max:
        raise TooLarge(
            f"target_prompt_logprobs names {targets.values.size} cells; allowed: {limits.prompt_targets_max}"
        )
    wrong = np.flatnonzero((targets.values < -1) | (targets.values >= config.vocab_size))
    if wrong.size:
        index, allowed = int(wrong[0]), f"-1 (nothing is asked), or a token id, 0 to {config.vocab_size - 1}"
        raise InvalidField(f"target_prompt_logprobs.data[{index}]", int(targets.values[index]), allowed)
    if not (targets.values >= 0).any():
        raise InvalidField("target_prompt_logprobs", "-1 everywhere", "at least one token id")


def _check_stops(request: SampleRequest, config: Facts) -> None:
    strings, tokens = request.params.stop_strings, request.params.stop_tokens
    if len(strings) + len(tokens) > limits.stop_sequences_max:
        raise InvalidField(
            "sampling_params.stop", len(strings) + len(tokens), f"up to {limits.stop_sequences_max} stops"
        )
    if "" in strings:
        raise InvalidField("sampling_params.stop", "", "strings of at least one character")
    for token in tokens:
        if not 0 <= token < config.vocab_size:
            raise InvalidField("sampling_params.stop", token, f"token ids 0 to {config.vocab_size - 1}")


def _between(field: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise InvalidField(field, value, f"{least} to {most}")
