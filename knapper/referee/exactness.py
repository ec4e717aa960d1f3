"""How far the same thing is off itself: between sampler and trainer, alone and in a crowd, once and again."""

import numpy as np
import tinker
from tinker import types

from knapper.referee.court import (
    Court,
    Floats,
    Observation,
    Violation,
    apart,
    check,
    datum,
    expect_equal,
    forward,
    shown,
    text,
    texts,
)

_CROWD = 12
_PARAMS = types.SamplingParams(max_tokens=24, seed=11, temperature=1.0, stop=[])


def _sample(sampler: tinker.SamplingClient, seed: int = 3) -> types.SampledSequence:
    [found] = sampler.sample(types.ModelInput.from_ints(text(16, seed)), 1, _PARAMS).result().sequences
    return found


def _logprobs(found: types.SampledSequence) -> Floats:
    return np.asarray(found.logprobs, np.float64)


@check("exactness", "the sampler's log-probabilities are the trainer's")
def sampler_is_trainer(court: Court) -> Observation:
    prompt, found = text(16, 3), _sample(court.sampler)
    trained = forward(court.trained, [datum([*prompt, *found.tokens], weights=[1.0] * (15 + len(found.tokens)))])
    return expect_equal(court, _logprobs(found), trained[15:], f"{len(found.tokens)} sampled tokens")


@check("exactness", "a prompt's log-probabilities are the trainer's")
def prompt_is_trainer(court: Court) -> Observation:
    prompt = text(40, 6)
    found = np.asarray(court.sampler.compute_logprobs(types.ModelInput.from_ints(prompt)).result()[1:], np.float64)
    return expect_equal(court, found, forward(court.trained, [datum(prompt, weights=[1.0] * 39)]), "40 tokens")


@check("exactness", "a pass says the same again")
def repeated(court: Court) -> Observation:
    data = texts(3, seed=20)
    return expect_equal(court, forward(court.trained, data), forward(court.trained, data), "twice")


@check("exactness", "a datum says the same alone and in a batch")
def batched(court: Court) -> Observation:
    data = texts(6, seed=30)
    together = forward(court.trained, data)
    alone = np.concatenate([forward(court.trained, [each]) for each in data])
    return expect_equal(court, together, alone, "6 datums")


@check("exactness", "a sample is the same alone and in a crowd")
def crowded_samples(court: Court) -> Observation:
    alone = _sample(court.sampler)
    prompts = [types.ModelInput.from_ints(text(10 + 3 * n, n)) for n in range(_CROWD)]
    crowd = [court.base.sample(prompt, 1, _PARAMS) for prompt in prompts[: _CROWD // 2]]
    crowd += [court.sampler.sample(prompt, 1, _PARAMS) for prompt in prompts[_CROWD // 2 :]]
    among = _sample(court.sampler)
    for each in crowd:
        each.result()
    if alone.tokens != among.tokens:
        same = sum(1 for one, other in zip(alone.tokens, among.tokens, strict=False) if one == other)
        raise Violation(f"of the same seed {same} of {len(alone.tokens)} tokens are the same beside {_CROWD} others")
    difference = apart(_logprobs(alone), _logprobs(among))
    return Observation(
        f"beside {_CROWD} others: the same tokens, log-probabilities {shown(difference)}", {"nats": difference}
    )


@check("exactness", "a run says the same alone and beside others")
def crowded_runs(court: Court) -> Observation:
    data = texts(3, seed=50)
    alone = forward(court.trained, data)
    others = [court.run(seed) for seed in range(3)]
    crowd = [each.forward_backward(texts(3, seed=60 + n), "cross_entropy") for n, each in enumerate(others)]
    among = forward(court.trained, data)
    for each in crowd:
        each.result()
    return expect_equal(court, alone, among, "beside 3 other runs")
