"""Models at their true sizes, each loaded once for a file of tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from knapper.engine import memory
from tests.engine.gate import checks
from tests.engine.gate.models import CONFIGS, write_model
from tests.engine.gate.phases import Bench, bench

_REFERENCE = "H100 (80 GB)"  # of the floors


# A mixture of 18,867 tensors takes minutes.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.long] if "A3B" in name else []) for name in CONFIGS],
)
def sized_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Bench]]:
    name = str(request.param)
    directory: Path = tmp_path_factory.mktemp(name)
    with bench(write_model(directory, name)) as one:
        expect_reference(one)
        yield name, one


def expect_reference(one: Bench) -> None:
    """Passes as on the card of the floors."""
    passes = checks.account(one, memory.CARDS[_REFERENCE]).passes
    assert passes is not None
    one.decoder.passes = passes
