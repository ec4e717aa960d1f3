"""The promised bits, on a real model at its real shapes, under every instruction set that this CPU has."""

import os
from pathlib import Path

import pytest

from benchmarks.exactness import DTYPES, InstructionSet, instruction_sets, measured
from knapper.catalogue.download import SMOLLM2, obtain
from knapper.settings import Settings
from tests import instructions as instructions_tried


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The demo's model, 135 million weights, where `make demo` has it too."""
    return obtain(SMOLLM2, Settings.load(os.environ).cache)


def cases() -> list[object]:
    """bfloat16 where the CPU multiplies it; emulated, as AVX2 has it, in the long run: it takes minutes."""
    slow = pytest.mark.long
    return [
        pytest.param(
            one, dtype, id=f"{one.name} {dtype}", marks=[slow] if (one.name, dtype) == ("AVX2", "bfloat16") else []
        )
        for one in instruction_sets()
        for dtype in DTYPES
    ]


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("instructions", "dtype"), cases())
def test_no_neighbour_changes_a_bit_at_real_shapes(instructions: InstructionSet, dtype: str, smollm2: Path) -> None:
    row = measured(instructions, str(smollm2), dtype, threads=1, quick=True)
    instructions_tried.note(dtype, environment={**os.environ, **instructions.environment})
    assert row.broken == []
    assert row.zero, row
    assert any("adapter of rank 32" in product for product in row.found), "the adapters were not tried"
