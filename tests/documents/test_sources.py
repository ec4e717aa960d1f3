"""Each formula of the engine names its source: a paper, or the protocol's page."""

import re
from collections.abc import Callable

import pytest

from knapper.engine.layers import batch_invariant_attention, head, rope
from knapper.engine.models.blocks import RmsNorm
from knapper.engine.models.layer import ScoreRule
from knapper.engine.training import losses, optimizer

_SOURCE = re.compile(r"Source: [^\n]*(arXiv \d{4}\.\d{4,5}|the protocol's page)")


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_a_loss_names_its_source(name: str) -> None:
    assert _SOURCE.search(losses.LOSSES[name].formula.__doc__ or "")


def test_the_optimizer_names_its_source() -> None:
    assert _SOURCE.search(optimizer.step.__doc__ or "")


FORMULAS = [
    rope.frequencies, rope.rotated, rope._llama3_scaled, rope._yarn_scaled, rope._long_scaled, RmsNorm, ScoreRule,
    batch_invariant_attention._backward, head.capped_,
]  # fmt: skip


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_of_the_decoder_names_its_source(formula: Callable[..., object]) -> None:
    assert _SOURCE.search(formula.__doc__ or "")
