"""AdamW is torch's, on a flat arena, and leaves what it is given alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from knapper.engine.training.optimizer import Moments, check, is_finite, norm_of, scaled_norm, step
from knapper.errors import InvalidField, UserError
from knapper.wire.types import AdamW

SIZE = 1000


def draw(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * scale


def fresh() -> Moments:
    return Moments(torch.zeros(SIZE), torch.zeros(SIZE), 0)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_steps_equal_torch_adamw_with_values_that_change_every_step(clip: float) -> None:
    weights, moments = draw(0), fresh()
    parameter = torch.nn.Parameter(weights.clone())
    reference = torch.optim.AdamW([parameter], foreach=False, fused=False)
    for index in range(6):
        values = AdamW(
            learning_rate=1e-3 * (index + 1), beta1=0.8 + 0.02 * index, beta2=0.95, eps=1e-12, weight_decay=0.1 * index,
            grad_clip_norm=clip,
        )  # fmt: skip
        grads = draw(index + 1, scale=0.1)
        parameter.grad = grads.clone()
        norm = grads.norm().item()
        if clip:
            assert torch.nn.utils.clip_grad_norm_([parameter], clip).item() == pytest.approx(norm)
        reference.param_groups[0].update(
            lr=values.learning_rate,
            betas=(values.beta1, values.beta2),
            eps=values.eps,
            weight_decay=values.weight_decay,
        )
        reference.step()
        weights, moments, metrics = step(weights, grads, moments, values)
        torch.testing.assert_close(weights, parameter.detach(), rtol=1e-6, atol=1e-7)
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert metrics["optimizer_steps"] == moments.step == index + 1
        assert "step" not in metrics, "the name of a training loop's own count, which this would overwrite"
        assert metrics["learning_rate"] == values.learning_rate


def test_first_step_is_the_formula_by_hand() -> None:
    weights, grads = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    zero = torch.zeros(2)
    result, moments, _ = step(weights, grads, Moments(zero, zero, 0), AdamW(learning_rate=0.1, weight_decay=0.5))
    # decay: w * (1 - 0.1 * 0.5); bias correction makes the first step lr * sign(gradient)
    torch.testing.assert_close(result, torch.tensor([2.0 * 0.95 - 0.1, -1.0 * 0.95 + 0.1]))
    torch.testing.assert_close(moments.m_P, 0.1 * grads)
    torch.testing.assert_close(moments.v_P, 0.05 * grads**2)


def test_what_it_is_given_is_not_written_to() -> None:
    weights, grads, moments = draw(0), draw(1), Moments(draw(2), draw(3).abs(), 4)
    before = [t.clone() for t in (weights, grads, moments.m_P, moments.v_P)]
    step(weights, grads, moments, AdamW(learning_rate=0.1, grad_clip_norm=0.01))
    assert all(torch.equal(a, b) for a, b in zip(before, (weights, grads, moments.m_P, moments.v_P), strict=True))


def test_a_zero_gradient_moves_nothing_without_momentum_and_counts() -> None:
    result, moments, metrics = step(draw(0), torch.zeros(SIZE), fresh(), AdamW())
    assert torch.equal(result, draw(0))
    assert (moments.step, metrics["grad_norm"]) == (1, 0.0)


@pytest.mark.parametrize("field", ["learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf, -math.inf])
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(InvalidField, match=f"adam_params.{field} is"):
        check(replace(AdamW(), **{field: value}))


@pytest.mark.parametrize("field", ["beta1", "beta2"])
def test_betas_stay_below_one(field: str) -> None:
    check(replace(AdamW(), **{field: 0.999999}))
    with pytest.raises(InvalidField, match=field):
        check(replace(AdamW(), **{field: 1.0}))


def test_zero_is_allowed_everywhere() -> None:
    check(AdamW(learning_rate=0.0, beta1=0.0, beta2=0.0, eps=0.0, weight_decay=0.0, grad_clip_norm=0.0))


@pytest.mark.parametrize(
    ("grads", "values", "what"),
    [
        (draw(1), AdamW(learning_rate=1e30, weight_decay=1e30), "weights"),
        (
            draw(1, 1e25),
            AdamW(),
            "second moments",
        ),  # the squares overflow float32; Adam would then stand still for ever
        (torch.zeros(SIZE), AdamW(eps=0.0), "weights"),  # 0 / 0
    ],
)
def test_a_result_that_is_not_finite_is_refused_and_named(grads: Tensor, values: AdamW, what: str) -> None:
    with pytest.raises(UserError, match=f"would make the {what} not finite.*nothing was changed"):
        step(draw(0), grads, fresh(), values)


def test_clipping_saves_what_would_overflow() -> None:
    result, _, metrics = step(draw(0), draw(1, 1e25), fresh(), AdamW(grad_clip_norm=1.0))
    assert is_finite(result)
    assert metrics["grad_norm"] == pytest.approx(draw(1).double().norm().item() * 1e25, rel=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_wrong_number_is_seen(wrong: float) -> None:
    values = draw(0, 1e37)
    assert is_finite(values)
    values[123] = wrong
    assert not is_finite(values)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_norm_without_float64_is_the_norm(scale: float) -> None:
    values = draw(3, scale)
    assert scaled_norm(values) == pytest.approx(norm_of(values), rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_norm_without_float64_is_finite_only_if_all_are(bad: float) -> None:
    assert scaled_norm(torch.zeros(SIZE)) == 0
    assert math.isfinite(scaled_norm(torch.full((SIZE,), 3e38)))
    values = draw(4)
    values[17] = bad
    assert not math.isfinite(scaled_norm(values))


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 5000])
@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e-12, 1e-30, 1e30])
def test_the_norm_is_that_of_float64_whatever_the_numbers_size(size: int, scale: float) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) * scale
    assert norm_of(values) == pytest.approx(float(torch.linalg.vector_norm(values.double())), rel=1e-6, abs=0)
    assert is_finite(values)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1023, 1024, 4095, 4096, 4999])
def test_one_wrong_number_is_seen_wherever_it_is(wrong: float, place: int) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(place)) * 1e37
    assert is_finite(values)
    values[place] = wrong
    assert not is_finite(values)
    assert not math.isfinite(norm_of(values))


def test_large_and_small_numbers_are_added_apart_so_that_no_small_one_is_lost() -> None:
    """Rows of 1024 are summed in float32, their norms in float64: exact here, and inexact in another order."""
    values = torch.ones(4096, 1024)
    values[::4] = 2000.0
    assert norm_of(values.flatten()) == pytest.approx(math.sqrt(1024 * 1024 * (4e6 + 3)), rel=1e-9)


def test_the_norm_of_numbers_whose_squares_vanish_is_float64_s() -> None:
    values = draw(5, 1e-15)
    assert norm_of(values) == pytest.approx(float(torch.linalg.vector_norm(values.double())), rel=1e-12, abs=0)


@pytest.mark.parametrize(
    ("norm", "clip"), [(1e-6, 1e-7), (1e-6, 1.5e-6), (3e-7, 1e-6), (5.0, 0.5), (2.0, 3.0), (1e-9, 1e-12)]
)
def test_the_clip_is_that_of_clip_grad_norm_down_to_the_smallest_norms(norm: float, clip: float) -> None:
    """min(1, clip / (norm + 1e-6)): where the norm is about as small, the summand and its sign decide."""
    grads = torch.tensor([0.6, -0.8]) * norm
    _, moments, _ = step(torch.zeros(2), grads, Moments(torch.zeros(2), torch.zeros(2), 0), AdamW(grad_clip_norm=clip))
    scale = min(1.0, clip / (norm + 1e-6))
    torch.testing.assert_close(moments.m_P, 0.1 * grads * scale, rtol=1e-5, atol=0)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = grads.clone()
    torch.nn.utils.clip_grad_norm_([parameter], clip)
    torch.testing.assert_close(moments.m_P, 0.1 * parameter.grad, rtol=1e-5, atol=0)


def test_the_bits_are_those_of_torch_s_fused_step() -> None:
    weights, moments = draw(0), fresh()
    parameter = torch.nn.Parameter(weights.clone())
    reference = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1, fused=True)
    for index in range(20):
        parameter.grad = draw(index + 1)
        reference.step()
        values = AdamW(learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-12, weight_decay=0.1)
        weights, moments, _ = step(weights, draw(index + 1), moments, values)
    assert torch.equal(weights, parameter.detach())


def test_a_step_checks_its_values_and_check_answers_them() -> None:
    values = AdamW(learning_rate=0.5)
    assert check(values) is values
    with pytest.raises(InvalidField, match=r"adam_params\.beta1"):
        step(draw(0), draw(1), fresh(), replace(values, beta1=1.5))


def test_the_norm_of_nothing_is_zero_without_float64_too() -> None:
    assert scaled_norm(torch.zeros(0)) == 0.0
