"""Each formula of training says where it is from: a paper, or the protocol's page."""

import re

import pytest

from knapper.engine.training import losses, optimizer

_SOURCE = re.compile(r"Source: [^\n]*(arXiv \d{4}\.\d{4,5}|the protocol's page)")


@pytest.mark.parametrize("name", sorted(losses.LOSSES))
def test_a_loss_names_its_source(name: str) -> None:
    assert _SOURCE.search(losses.LOSSES[name].formula.__doc__ or "")


def test_the_optimizer_names_its_source() -> None:
    assert _SOURCE.search(optimizer.step.__doc__ or "")
