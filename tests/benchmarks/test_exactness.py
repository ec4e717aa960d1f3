"""`make exactness`: a row comes back from its process whatever it found, and the table says what was lost."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks.exactness import Row, instruction_sets, measured, table
from tests.engine.tiny import tiny_model

KEPT = Row(
    instructions="AVX2", dtype="float32", threads=2, sampler_trainer=(0.0, 0.0), trainer_alone=(0.0, 0.0),
    sampler_alone=(0.0, 0.0), run_alone=0.0, train_s=(4.0, 3.5), decode_s=(0.1, 0.099), found={}, broken=[],
)  # fmt: skip


@pytest.mark.parametrize("lost", [2e-5, float("inf")])
def test_a_row_comes_back_from_its_process_and_is_no_zero(lost: float) -> None:
    row = replace(KEPT, sampler_alone=(0.0, lost))
    assert Row.read(json.dumps(asdict(row))) == row
    assert not row.zero
    assert KEPT.zero


def test_the_table_names_what_was_lost_and_both_speeds() -> None:
    lost = replace(KEPT, sampler_alone=(0.0, float("inf")), run_alone=0.3)
    assert table([lost]).splitlines()[-1] == (
        "| AVX2, float32, 2 | 0 / 0 | 0 / 0 | 0 / other tokens | 0.3 | 4.00, 3.50 s | 100, 99 ms |"
    )


def test_a_row_of_a_real_process_is_all_zeros(tmp_path: Path) -> None:
    own = instruction_sets()[-1]
    row = measured(own, str(tiny_model(tmp_path)), "float32", 1, quick=True)
    assert row.zero, row
    assert row.instructions == own.name
