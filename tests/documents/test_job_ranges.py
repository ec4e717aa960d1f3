"""The column "allowed" of docs/jobs.md is what job.yaml's types allow."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

from knapper.jobs.spec import TYPES
from tests.documents.pages import read


class Range(NamedTuple):
    """`above`: `low` itself is not allowed; `below`: `high` itself is not."""

    low: float
    high: float
    above: bool = False
    below: bool = False


_NUMBER = r"-?\d[\d.]*(?:e\d+)?(?:\^\d+)?(?: - 1)?"
_RANGE = re.compile(rf"(above )?({_NUMBER}),? to (below )?({_NUMBER})")


def _number(text: str) -> float:
    power, minus, _ = text.partition(" - 1")
    base, raised, exponent = power.partition("^")
    return (float(base) ** int(exponent) if raised else float(base)) - bool(minus)


def _shown() -> dict[tuple[str, str], str]:
    """(kind, field) -> what the page allows; kind is empty for fields of every kind."""
    sections = re.split(
        r"^### (.+)$", read("docs/jobs.md").partition("## The fields of job.yaml")[2], flags=re.MULTILINE
    )
    return {
        ("" if heading == "Every kind" else heading, name): allowed
        for heading, text in zip(sections[1::2], sections[2::2], strict=True)
        for name, allowed in re.findall(r"^\| `([\w.]+)` \| (.+?) \| .+? \| .*\|$", text, flags=re.MULTILINE)
    }


def _ranges(kind: Any, inside: str = "") -> Iterator[tuple[str, Range]]:
    """Of the numbers of a job's type that have two bounds."""
    for field in msgspec.inspect.type_info(kind).fields:  # type: ignore[attr-defined]
        options = field.type.types if isinstance(field.type, msgspec.inspect.UnionType) else (field.type,)
        for option in options:
            if isinstance(option, msgspec.inspect.StructType):
                yield from _ranges(option.cls, f"{inside}{field.name}.")
            elif isinstance(option, msgspec.inspect.IntType | msgspec.inspect.FloatType):
                low = option.ge if option.gt is None else option.gt
                high = option.le if option.lt is None else option.lt
                assert low is not None, f"{inside}{field.name} has no lower bound"
                assert high is not None, f"{inside}{field.name} has no upper bound"
                yield (
                    f"{inside}{field.name}",
                    Range(float(low), float(high), option.gt is not None, option.lt is not None),
                )


SHOWN = _shown()
BOUNDED = [(kind, *row) for kind in TYPES for row in _ranges(TYPES[kind])]


@pytest.mark.parametrize(("kind", "field", "allowed"), BOUNDED)
def test_the_page_allows_what_the_type_allows(kind: str, field: str, allowed: Range) -> None:
    text = SHOWN.get((kind, field)) or SHOWN[("", field)]
    found = _RANGE.search(text)
    assert found, f"{field}: {text!r} is no range"
    low = -1.0 if text.startswith("-1, or") else _number(found[2])
    assert Range(low, _number(found[4]), bool(found[1]), bool(found[3])) == allowed


def test_every_range_of_the_page_was_compared() -> None:
    compared = {field for _, field, _ in BOUNDED}
    assert {field for (_, field), text in SHOWN.items() if _RANGE.search(text)} == compared
