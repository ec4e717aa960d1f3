"""The points of a sweep, and the job.yaml of each: that of the sweep without `sweep`, with other values."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from knapper.errors import InvalidField
from knapper.jobs import yaml_document
from knapper.jobs.sweep.spec import OVER, Range, SweepSpec

Point = dict[str, Any]  # by dotted field


def grid(sweep: SweepSpec) -> Iterator[Point]:
    """In order: the last field changes first."""
    columns = [values for values in sweep.over.values() if isinstance(values, list)]
    for point in itertools.product(*columns):
        yield dict(zip(sweep.over, point, strict=True))


def checked(sweep: SweepSpec) -> Iterator[Point]:
    """All points of a grid; of a search the ends of its ranges and each of its values, beside the first of the others.

    A field of job.yaml allows all between two numbers that it allows.
    """
    if sweep.method == "grid":
        yield from grid(sweep)
        return
    ends = {field: [each.low, each.high] if isinstance(each, Range) else each for field, each in sweep.over.items()}
    first = {field: values[0] for field, values in ends.items()}
    yield first
    for field, values in ends.items():
        yield from (first | {field: value} for value in values[1:])


def applied(content: dict[str, Any], point: Point) -> dict[str, Any]:
    """job.yaml's content for this point. Raises InvalidField for a field inside of what has no fields."""
    job = copy.deepcopy({name: value for name, value in content.items() if name != "sweep"})
    for field, value in point.items():
        *outer, last = field.split(".")
        part = job
        for name in outer:
            part = part.setdefault(name, {})
            if not isinstance(part, dict):
                raise InvalidField(f"{OVER}.{field}", "there", f"fields of the job: its `{name}` has none inside")
        part[last] = copy.deepcopy(value)
    return job


def job_yaml(content: dict[str, Any], point: Point) -> bytes:
    """As text, which can be submitted as a job of its own."""
    return yaml_document.write(applied(content, point))
