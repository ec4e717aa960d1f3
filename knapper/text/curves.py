"""Curves for a terminal, drawn with eighths of a block."""

import itertools
import math
from collections.abc import Sequence
from typing import Final

_EIGHTHS: Final = " ▁▂▃▄▅▆▇█"
_STEPS: Final = len(_EIGHTHS) - 1  # of one row


def curve(
    values: Sequence[float], width: int, height: int = 1, low: float | None = None, high: float | None = None
) -> list[str]:
    """`height` rows of at most `width` characters, the top row first; values that are not finite leave a gap.

    More values than characters are averaged. `low`, `high`: the range of the axis, of the values themselves without.
    """
    columns = _columns(values, width)
    finite = [value for value in columns if math.isfinite(value)]
    if not finite:
        return [" " * len(columns)] * height
    low, high = min(finite) if low is None else low, max(finite) if high is None else high
    levels = [_level(value, low, high, height) for value in columns]
    return ["".join(_EIGHTHS[min(_STEPS, max(0, level - row * _STEPS))] for level in levels)
            for row in reversed(range(height))]  # fmt: skip


def _columns(values: Sequence[float], width: int) -> list[float]:
    count = min(width, len(values))
    bounds = [round(n * len(values) / count) for n in range(count + 1)] if count else [0]
    return [_mean(values[begin:end]) for begin, end in itertools.pairwise(bounds)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _level(value: float, low: float, high: float, height: int) -> int:
    """1 to all eighths of the rows; in the middle if nothing changes; 0 for a gap."""
    most = height * _STEPS
    if not math.isfinite(value):
        return 0
    if high <= low:
        return (most + 1) // 2
    return 1 + round(min(1.0, max(0.0, (value - low) / (high - low))) * (most - 1))
