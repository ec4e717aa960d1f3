"""Joins the metrics of the parts of one batch by the reduction in their names, `name:reduction`, as the SDK does."""

import operator
from collections.abc import Callable, Mapping

_JOINS: dict[str, Callable[[float, float], float]] = {
    "min": min,
    "max": max,
    "sum": operator.add,
}


def join(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """The metrics of both parts together. Another reduction than sum, min and max joins as a sum."""
    joined = dict(first)
    for name, value in second.items():
        combine = _JOINS.get(name.rpartition(":")[2], _JOINS["sum"])
        joined[name] = combine(joined[name], value) if name in joined else value
    return joined
