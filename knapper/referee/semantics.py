"""What the calls bring about: losses by their formulas, gradients by a loss that the client computes, and samples."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tinker
import torch
from tinker import types

from knapper.referee.court import (
    CHECKS,
    Check,
    Court,
    Floats,
    Observation,
    Violation,
    apart,
    check,
    datum,
    expect_equal,
    expect_same_step,
    forward,
    logprobs,
    loss,
    step,
    text,
    texts,
)
from knapper.referee.losses import LOSSES, LossFormula, inputs_of

_ADAM = types.AdamParams(learning_rate=1e-3)
_LOSS_PART = 1e-3  # of the sum of its terms without their signs: what rounding to bfloat16 on the way may come to
_RATIOS = (-0.7, -0.1, 0.1, 0.7)  # logarithms: on both sides of the clips, and none near them


def _data(court: Court, of: LossFormula) -> list[types.Datum]:
    """Two texts with what the loss needs, whose sampler was somewhat off the learner."""
    found = []
    for n in range(2):
        tokens, dice = text(20 + n, seed=5 + n), np.random.default_rng(n)
        count = len(tokens) - 1
        weights = np.where(np.arange(count) % 4 == 1, 0.0, dice.normal(size=count)).tolist()
        if of.name == "cross_entropy":
            found.append(datum(tokens, weights=weights))
            continue
        p = forward(court.trained, [datum(tokens, weights=[1.0] * count)])
        sampled = (p - dice.choice(_RATIOS, count)).tolist()
        found.append(datum(tokens, logprobs=sampled, advantages=dice.normal(size=count).tolist()))
    return found


def _terms(of: LossFormula, data: Sequence[types.Datum], found: Floats) -> torch.Tensor:
    """Of all tokens, from the log-probabilities that the server returned for the same data."""
    lengths = [each.loss_fn_inputs["target_tokens"].to_torch().numel() for each in data]
    parts = torch.as_tensor(found).split(lengths)
    return torch.cat([of.terms(p, inputs_of(each)) for p, each in zip(parts, data, strict=True)])


def _value(of: LossFormula) -> Callable[[Court], Observation]:
    def value(court: Court) -> Observation:
        data = _data(court, of)
        output = court.resumed().forward_backward(data, of.name, dict(of.config)).result()  # type: ignore[arg-type]  # its names are literals
        terms = _terms(of, data, logprobs(output))
        found, expected = loss(output), float(terms.sum())
        off = abs(found - expected) / max(float(terms.abs().sum()), 1e-9)
        if not off <= _LOSS_PART:
            raise Violation(f"the server says {found:.6g}, its own log-probabilities say {expected:.6g}")
        return Observation(f"{found:.6g}, by the formula {expected:.6g}", {"part": off})

    return value


def _gradient(of: LossFormula) -> Callable[[Court], Observation]:
    def by_formula(data: list[types.Datum], found: list[Any]) -> tuple[Any, dict[str, float]]:
        return sum(of.terms(p.double(), inputs_of(each)).sum() for p, each in zip(found, data, strict=True)), {}

    def gradient(court: Court) -> Observation:
        data, probe = _data(court, of), texts(2, seed=40)
        ours, theirs = court.resumed(), court.resumed()
        before = forward(theirs, probe)
        theirs.forward_backward(data, of.name, dict(of.config)).result()  # type: ignore[arg-type]  # its names are literals
        ours.forward_backward_custom(data, by_formula).result()
        for each in (ours, theirs):
            each.optim_step(_ADAM).result()
        return expect_same_step(before, forward(theirs, probe), forward(ours, probe), "the same step by the formula")

    return gradient


for _loss in LOSSES:
    CHECKS.append(Check("semantics", f"{_loss.name} is its formula", _value(_loss)))
    CHECKS.append(Check("semantics", f"{_loss.name} has its formula's gradient", _gradient(_loss)))


@check("semantics", "forward says what forward_backward says")
def forward_is_forward_backward(court: Court) -> Observation:
    data, training = texts(3), court.resumed()
    one = training.forward(data, "cross_entropy").result()
    other = training.forward_backward(data, "cross_entropy").result()
    if abs(loss(one) - loss(other)) > court.tolerance * max(1.0, abs(loss(one))):
        raise Violation(f"the losses are {loss(one):.6g} and {loss(other):.6g}")
    return expect_equal(court, logprobs(one), logprobs(other), "log-probabilities")


@check("semantics", "forward leaves no gradient")
def no_gradient(court: Court) -> Observation:
    data, training = texts(2), court.run()
    before = forward(training, data)
    training.optim_step(_ADAM).result()
    return expect_equal(court, before, forward(training, data), "after a step without a backward pass")


@check("semantics", "gradients add up until a step")
def gradients_add_up(court: Court) -> Observation:
    data = texts(4)
    together, apart_ = court.resumed(), court.resumed()
    before = forward(together, data)
    together.forward_backward(data, "cross_entropy").result()
    for part in (data[:2], data[2:]):
        apart_.forward_backward(part, "cross_entropy").result()
    for each in (together, apart_):
        each.optim_step(_ADAM).result()
    return expect_same_step(before, forward(together, data), forward(apart_, data), "in one pass and in two")


@check("semantics", "a loss is a sum, not a mean")
def sums(court: Court) -> Observation:
    data = texts(2)
    once, twice = (loss(court.trained.forward(each, "cross_entropy").result()) for each in (data, data * 2))
    if abs(twice - 2 * once) > 1e-3 * abs(twice):
        raise Violation(f"the loss of a batch is {once:.6g}, of the batch twice {twice:.6g}")
    return Observation(f"{once:.6g}, and {twice:.6g} of the batch twice")


@check("semantics", "steps lower the loss, and one of learning rate 0 changes nothing")
def steps(court: Court) -> Observation:
    data, training = texts(2), court.run()
    losses = [loss(training.forward(data, "cross_entropy").result())]
    before = forward(training, data)
    step(training, data, learning_rate=0.0)
    expect_equal(court, before, forward(training, data), "after a step of learning rate 0")
    for _ in range(3):
        step(training, data)
        losses.append(loss(training.forward(data, "cross_entropy").result()))
    if not losses[-1] < losses[0]:
        raise Violation(f"three steps of 1e-3 lead from {losses[0]:.6g} to {losses[-1]:.6g}")
    return Observation(" ".join(f"{each:.5g}" for each in losses))


@check("semantics", "Adam's first step does not depend on the loss's scale")
def adam(court: Court) -> Observation:
    tokens = text(30, seed=8)
    ones, threes = (datum(tokens, weights=[weight] * 29) for weight in (1.0, 3.0))
    one, other = court.resumed(), court.resumed()
    before = forward(one, [ones])
    for training, each in ((one, ones), (other, threes)):
        training.forward_backward([each], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-3, grad_clip_norm=0.0)).result()
    return expect_same_step(before, forward(one, [ones]), forward(other, [ones]), "with weights of 1 and of 3")


@check("semantics", "a loaded state is the saved one, and its next step too")
def states(court: Court) -> Observation:
    data, training = texts(2), court.resumed()
    step(training, data)
    path = training.save_state("referee-back", ttl_seconds=3600).result().path
    saved = forward(training, data)
    step(training, data)
    after = forward(training, data)
    training.load_state_with_optimizer(path).result()
    expect_equal(court, saved, forward(training, data), "after loading")
    step(training, data)
    return expect_equal(court, after, forward(training, data), "the step after loading")


@check("semantics", "a mistake in a datum is answered, and the run goes on")
def mistakes(court: Court) -> Observation:
    training = court.run()
    wrong = datum(text(10), weights=[1.0] * 4)
    try:
        training.forward_backward([wrong], "cross_entropy").result()
    except tinker.TinkerError as error:
        said = str(error)[:120]
    else:
        raise Violation("weights of another length than the targets were taken")
    forward(training, texts(1))
    return Observation(said)


# ---- sampling

_PROMPT = types.ModelInput.from_ints(text(12, seed=3))


def _tokens(court: Court, *, count: int = 2, **more: Any) -> list[list[int]]:
    params = types.SamplingParams(**({"max_tokens": 12, "temperature": 1.0} | more))
    return [list(each.tokens) for each in court.sampler.sample(_PROMPT, count, params).result().sequences]


@check("semantics", "a seed brings the same text again, and other seeds others")
def seeds(court: Court) -> Observation:
    if (once := _tokens(court, seed=4)) != (again := _tokens(court, seed=4)):
        raise Violation(f"seed 4 gave {once[0][:6]}... and {again[0][:6]}...")
    different = {str(_tokens(court, seed=seed)) for seed in range(5)}
    if len(different) < 4:
        raise Violation(f"five seeds gave {len(different)} texts")
    return Observation(f"seed 4 twice the same, five seeds {len(different)} texts")


@check("semantics", "temperature 0 is the same text whatever the seed")
def greedy(court: Court) -> Observation:
    found = [_tokens(court, count=1, temperature=0.0, seed=seed) for seed in (1, 2)]
    if found[0] != found[1]:
        raise Violation(f"seeds 1 and 2 gave {found[0][0][:6]}... and {found[1][0][:6]}...")
    return Observation(f"{len(found[0][0])} tokens")


@check("semantics", "as many samples, tokens and log-probabilities as asked for")
def shapes(court: Court) -> Observation:
    params = types.SamplingParams(max_tokens=7, seed=1, stop=[])
    sequences = court.sampler.sample(_PROMPT, 3, params).result().sequences
    found = [(len(each.tokens), len(each.logprobs or []), str(each.stop_reason)) for each in sequences]
    if [each[:2] for each in found] != [(7, 7)] * 3:
        raise Violation(f"3 samples of 7 tokens came as {found}")
    return Observation("3 samples of 7 tokens with a log-probability each")


@check("semantics", "a text ends with its stop token")
def stops(court: Court) -> Observation:
    whole = _tokens(court, count=1, temperature=0.0, stop=[])[0]
    token = whole[len(whole) // 2]
    params = types.SamplingParams(max_tokens=12, temperature=0.0, stop=[token])
    [cut] = court.sampler.sample(_PROMPT, 1, params).result().sequences
    expected = whole[: whole.index(token) + 1]
    if list(cut.tokens) != expected or cut.stop_reason != "stop":
        raise Violation(f"{list(cut.tokens)} ({cut.stop_reason}) instead of {expected} (stop)")
    return Observation(f"after {len(expected)} of {len(whole)} tokens")


@check("semantics", "a snapshot does not see later training")
def snapshots(court: Court) -> Observation:
    training, data = court.resumed(), texts(2)
    frozen = training.save_weights_and_get_sampling_client().result()
    before = _prompt_logprobs(frozen)
    step(training, data, learning_rate=1e-2)
    now = _prompt_logprobs(training.save_weights_and_get_sampling_client().result())
    if apart(before, now) == 0:
        raise Violation("what was trained is not in the next snapshot")
    return expect_equal(court, before, _prompt_logprobs(frozen), "of the prompt, before and after a step")


def _prompt_logprobs(sampler: tinker.SamplingClient) -> Floats:
    return np.asarray(sampler.compute_logprobs(_PROMPT).result()[1:], np.float64)
