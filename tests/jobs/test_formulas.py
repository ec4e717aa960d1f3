"""Advantages, and the gradient of preferences, against their definitions."""

import math

import numpy as np
import pytest
import torch

from knapper.jobs import advantages
from knapper.jobs.bill import covered, union
from knapper.jobs.preferences import preference


def test_advantages_of_a_group() -> None:
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 3.0])
    normalised = advantages.group_normalised(rewards)
    assert normalised.mean() == pytest.approx(0, abs=1e-12)
    assert normalised.std() == pytest.approx(1)
    assert advantages.group_centred(rewards).tolist() == [0.0, -1.0, -1.0, 0.0, 2.0]
    for formula in advantages.FORMULAS.values():
        assert formula(np.full(4, 0.7)).tolist() == [0.0] * 4


@pytest.mark.parametrize("seed", range(20))
def test_the_weights_of_a_pair_are_the_gradient_of_its_loss(seed: int) -> None:
    """The definition differentiated by autograd: at every size of the margin, to both sides."""
    draw = np.random.default_rng(seed)
    beta = float(draw.uniform(0.05, 2))
    values = draw.normal(scale=10 ** draw.uniform(-1, 2.5), size=4)
    chosen, rejected, chosen_reference, rejected_reference = (
        torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values
    )
    margin = beta * ((chosen - chosen_reference) - (rejected - rejected_reference))
    loss = -torch.nn.functional.logsigmoid(margin)
    loss.backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    found = preference(beta, (values[0], values[2]), (values[1], values[3]))
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12, abs=1e-300)
    assert found.margin == pytest.approx(float(margin.detach()), rel=1e-12)
    # cross_entropy's derivative by a log-probability is minus its weight
    assert -found.weight == pytest.approx(float(chosen.grad), rel=1e-9, abs=1e-300)
    assert found.weight == pytest.approx(float(rejected.grad), rel=1e-9, abs=1e-300)


def test_extreme_margins_are_finite() -> None:
    for value in (1e5, -1e5):
        found = preference(1.0, (value, 0.0), (0.0, 0.0))
        assert math.isfinite(found.loss)
        assert 0 <= found.weight <= 1


def test_busy_times_that_overlap_count_once() -> None:
    assert union([(3, 4), (0, 2), (1, 2.5), (4, 5)]) == [(0, 2.5), (3, 5)]
    assert covered([(0, 2), (1, 3), (10, 11)]) == 4
    assert covered([]) == 0
