"""Curves for a terminal."""

import math

import pytest

from knapper.text.curves import curve


def test_a_line_goes_from_the_lowest_to_the_highest_block() -> None:
    assert curve(range(8), 8) == ["▁▂▃▄▅▆▇█"]
    assert curve([3.0, 3.0], 8) == ["▄▄"], "what does not change is in the middle"
    assert curve([], 8, 2) == ["", ""]


def test_rows_stand_on_each_other() -> None:
    top, bottom = curve([0.0, 0.5, 1.0], 3, 2)
    assert bottom == "▁██"
    assert top[0] == " "
    assert top[2] == "█"


def test_more_values_than_characters_are_averaged_and_gaps_are_left() -> None:
    assert curve([0.0, 0.0, 1.0, 1.0], 2) == ["▁█"]
    assert curve([0.0, math.nan, 1.0], 3) == ["▁ █"]
    assert curve([math.nan, math.inf], 2, 2) == ["  ", "  "]
    assert len(curve([float(n) for n in range(1000)], 60)[0]) == 60


@pytest.mark.parametrize(("low", "high"), [(0.0, 10.0), (-10.0, 1.0)])
def test_curves_of_one_scale_can_be_compared(low: float, high: float) -> None:
    (alone,) = curve([0.0, 1.0], 2, 1, low, high)
    assert alone != "▁█"
