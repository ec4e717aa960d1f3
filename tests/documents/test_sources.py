"""Each formula of the engine names its source: a paper, or the protocol's page."""

import re
from collections.abc import Callable

import pytest

from knapper.engine.layers import rope
from knapper.engine.models.decoder import Decoder
from knapper.engine.training import losses, optimizer

_SOURCE = re.compile(r"Source: [^\n]*(arXiv \d{4}\.\d{4,5}|the protocol's page)")


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_a_loss_names_its_source(name: str) -> None:
    assert _SOURCE.search(losses.LOSSES[name].formula.__doc__ or "")


def test_the_optimizer_names_its_source() -> None:
    assert _SOURCE.search(optimizer.step.__doc__ or "")


@pytest.mark.parametrize("formula", [rope.frequencies, rope.rotated, rope._llama3_scaled, Decoder._norm])
def test_a_formula_of_the_decoder_names_its_source(formula: Callable[..., object]) -> None:
    assert _SOURCE.search(formula.__doc__ or "")
