"""Lengths of time as people read them."""

import pytest

from knapper.text.durations import clock


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.4, "0:59"),
        (59.6, "1:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (90061, "25:01:01"),
        (-3, "0:00"),
    ],
)
def test_a_length_reads_as_a_clock_shows_it(seconds: float, text: str) -> None:
    assert clock(seconds) == text
