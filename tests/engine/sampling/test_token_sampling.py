"""The distribution that is sampled from, its cuts and its log-probabilities."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from knapper.engine.sampling.token_sampling import (
    SampledTokens,
    alternatives,
    draw,
    finite_rows,
    log_distribution,
    uniforms,
    where_float64,
)
from knapper.wire.types import SamplingParams


def drawn(logits: Tensor, params: SamplingParams, count: int, seed: int = 0) -> SampledTokens:
    generator = np.random.default_rng(seed)
    return draw(logits.expand(count, -1), [params] * count, [float(u) for u in generator.random(count)])


def random_logits(vocabulary: int, seed: int = 0) -> Tensor:
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def test_frequencies_follow_the_probabilities() -> None:
    logits = random_logits(700)
    count = 40_000
    frequencies = torch.bincount(drawn(logits, SamplingParams(), count).tokens_N, minlength=700).double() / count
    expected = logits.double().softmax(-1)
    # Five standard deviations of each frequency.
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_logprobs_obey_the_law_of_temperature(temperature: float) -> None:
    logits = random_logits(300)
    tempered = drawn(logits, SamplingParams(temperature=temperature), 1).logprobs_NV[0]
    plain = drawn(logits, SamplingParams(), 1).logprobs_NV[0]
    torch.testing.assert_close(tempered - tempered[0], (plain - plain[0]) / temperature, atol=2e-5, rtol=1e-5)
    assert float(tempered.exp().sum()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-12, 1e-8, 1e-6])
def test_greedy_takes_the_likeliest_token_and_reports_untempered_logprobs(temperature: float) -> None:
    logits = random_logits(300)
    logits[17] = logits[200] = 9.0
    greedy = drawn(logits, SamplingParams(temperature=temperature), 5)
    assert greedy.tokens_N.tolist() == [17] * 5
    torch.testing.assert_close(greedy.logprobs_NV[0], logits.log_softmax(-1))


@pytest.mark.parametrize("temperature", [1.1e-6, 1e6])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    logits = random_logits(300) * 50
    result = drawn(logits, SamplingParams(temperature=temperature), 20)
    assert result.logprobs_N.isfinite().all()
    if temperature < 1:
        assert result.tokens_N.tolist() == [int(logits.argmax())] * 20


def expected_set(logits: Tensor, top_k: int, top_p: float) -> list[int]:
    """The kept tokens, by the definition, in plain Python."""
    p = logits.double().softmax(-1).tolist()
    order = sorted(range(len(p)), key=lambda token: (-p[token], token))
    order = order[: top_k if top_k != -1 else len(order)]
    mass = sum(p[token] for token in order)
    remaining: list[int] = []
    for token in order:
        if top_p < 1 and remaining and sum(p[other] for other in remaining) >= top_p * mass:
            break
        remaining.append(token)
    return sorted(remaining)


@pytest.mark.parametrize("vocabulary", [40, 3000])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (5, 1.0), (-1, 0.5), (-1, 0.999), (-1, 1e-9), (7, 0.6), (2000, 1.0), (2000, 0.9999)]
)
def test_cuts_keep_the_defined_set_and_renormalise_over_it(vocabulary: int, top_k: int, top_p: float) -> None:
    logits = random_logits(vocabulary) / 2  # flat enough that top_p 0.999 needs more than a thousand tokens
    params = SamplingParams(top_k=top_k, top_p=top_p)
    result = drawn(logits, params, 500)
    remaining = expected_set(logits, top_k, top_p)
    logprobs = result.logprobs_NV[0]
    assert (logprobs > -torch.inf).nonzero()[:, 0].tolist() == remaining
    assert set(result.tokens_N.tolist()) <= set(remaining)
    torch.testing.assert_close(logprobs[remaining], logits[remaining].log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_top_k_among_equals_keeps_the_lower_ids() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0, 1.0])
    remaining = drawn(logits, SamplingParams(top_k=2), 1).logprobs_NV[0] > -torch.inf
    assert remaining.nonzero()[:, 0].tolist() == [1, 3]


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    logits = torch.full((600,), -torch.inf)
    logits[[3, 300, 599]] = torch.tensor([0.0, 1.0, 0.5])
    logits[599] = -torch.inf
    ends = [0.0, math.nextafter(1.0, 0.0), 0.5]
    # -inf is what a cut leaves: the inverse must never land there.
    result = draw(logits.clamp(min=-1e9).expand(3, -1), [SamplingParams()] * 3, ends)
    assert result.tokens_N.tolist() == [3, 300, 300]


def test_a_row_has_the_same_bits_alone_and_in_a_batch() -> None:
    logits = torch.stack([random_logits(2000, seed) for seed in range(40)])
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(top_k=3),
        SamplingParams(temperature=0),
    ]
    params = [kinds[row % 4] for row in range(40)]
    numbers = [float(u) for u in np.random.default_rng(1).random(40)]
    together = draw(logits, params, numbers)
    for row in range(40):
        alone = draw(logits[row : row + 1], params[row : row + 1], numbers[row : row + 1])
        assert torch.equal(alone.tokens_N, together.tokens_N[row : row + 1])
        assert torch.equal(alone.logprobs_NV, together.logprobs_NV[row : row + 1])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 999, 1000])
def test_a_row_with_a_number_that_is_not_finite_is_told_from_its_neighbours(broken: float, place: int) -> None:
    logits = torch.stack([random_logits(1001, seed) for seed in range(4)])
    logits[2, place] = broken
    assert finite_rows(logits).tolist() == [[True], [True], [False], [True]]


def test_alternatives_are_sorted_and_padded_with_empty_cells() -> None:
    logprobs = drawn(torch.tensor([1.0, 3.0, 2.0, 0.0]), SamplingParams(top_k=2), 1).logprobs_NV
    tokens, values = alternatives(logprobs, 6)
    assert tokens[0].tolist() == [1, 2, 0, 0, 0, 0]
    assert values[0, 2:].tolist() == [-99999.0] * 4
    torch.testing.assert_close(values[0, :2], log_distribution(torch.tensor([[3.0, 2.0]]))[0])


def test_uniforms_depend_on_seed_and_sample_alone() -> None:
    first = uniforms(7, 0).random(5)
    assert uniforms(7, 0).random(5).tolist() == first.tolist()
    assert uniforms(7, 1).random(5).tolist() != first.tolist()
    assert uniforms(8, 0).random(5).tolist() != first.tolist()
    # Pinned: a seed a user wrote down years ago still gives its tokens.
    assert uniforms(0, 0).random() == 0.7378060618188116


def test_logits_on_a_macs_gpu_are_drawn_from_on_the_cpu() -> None:
    """Told by the device's name alone: no such GPU was there."""
    logits = random_logits(300)[None]

    class OnMps:
        device = torch.device("mps")

        def cpu(self) -> Tensor:
            return logits

    assert where_float64(OnMps()) is logits  # type: ignore[arg-type]  # as much of a tensor as is looked at
    assert where_float64(logits) is logits
