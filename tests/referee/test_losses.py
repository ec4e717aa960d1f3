"""The referee's formulas are those that knapper's own are compared with, which were written apart from them."""

from typing import Any

import numpy as np
import pytest
import torch

from knapper.referee.court import datum, text
from knapper.referee.losses import LOSSES, LossFormula, inputs_of
from tests.conformance import reference


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_a_formula_and_its_gradient_are_those_of_the_reference(loss: LossFormula) -> None:
    dice = np.random.default_rng(3)
    tokens, count = text(20), 19
    inputs: dict[str, Any] = {"weights": dice.normal(size=count).tolist()}
    if loss.name != "cross_entropy":
        p = dice.normal(size=count) - 2
        inputs = {"logprobs": p.tolist(), "advantages": dice.normal(size=count).tolist()}
    given = datum(tokens, **inputs)
    learner = torch.as_tensor(dice.normal(size=count) * 0.3 - 2, dtype=torch.float64).requires_grad_()
    ours = loss.terms(learner, inputs_of(given)).sum()
    [of_ours] = torch.autograd.grad(ours, learner)
    theirs = reference.loss(loss.name, given, learner, loss.config)
    [of_theirs] = torch.autograd.grad(theirs, learner)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(of_ours, of_theirs, rtol=1e-5, atol=1e-6, check_dtype=False)
