"""Every size and time on a page has its source in `figures.py`, and agrees with it."""

import importlib
import re

import msgspec
import pytest

from knapper import limits
from knapper.settings import Settings
from tests.documents.figures import FIGURES, IN_WORDS, MEASURED
from tests.documents.pages import PAGES, name_of, prose, read

_UNITS = {
    "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "kB": 10**3, "MB": 10**6, "GB": 10**9,
    "ms": 1e-3, "s": 1, "second": 1, "min": 60, "minute": 60, "hour": 3600, "day": 86400, "week": 7 * 86400,
}  # fmt: skip
_FIGURE = re.compile(
    r"(?<![\w.])(\d[\d,.]*)(?: |-)(bytes|[KMG]i?B|kB|ms|seconds?|s|minutes?|min|hours?|days?|weeks?)\b"
)


def _figures(page: str) -> list[str]:
    return [f"{number} {unit}" for number, unit in _FIGURE.findall(" ".join(prose(page).split()))]


def _value(figure: str) -> float:
    number, unit = figure.split(" ")
    return float(number.replace(",", "")) * (_UNITS[unit] if unit in _UNITS else _UNITS[unit.removesuffix("s")])


def _of_code(source: str) -> float:
    place, name = source.split(":")
    if place == "settings":
        (default,) = [each.default for each in msgspec.structs.fields(Settings) if each.name == name]
        return float(default)
    return float(getattr(limits if place == "limits" else importlib.import_module(place), name))


@pytest.mark.parametrize("page", [name_of(path) for path in PAGES if name_of(path) not in MEASURED])
def test_every_size_and_time_has_a_source(page: str) -> None:
    expected = [figure for figure, _ in FIGURES.get(page, [])]
    assert _figures(page) == expected, f"{page}: tests/documents/figures.py names the source of each, in order"


@pytest.mark.parametrize(("page", "figure", "source"), [(page, *row) for page in FIGURES for row in FIGURES[page]])
def test_a_figure_is_its_sources(page: str, figure: str, source: str) -> None:
    if source.startswith("("):
        assert source.endswith(")")
    elif source == "docs/performance.md":
        assert re.search(rf"\| {re.escape(figure)} \|", read(source)), f"{page}: {figure} is in no table of {source}"
        assert re.search(rf"\[[^\]]*{re.escape(figure)}[^\]]*\]\(performance\.md#\w+\)", prose(page).replace("\n", " "))
    elif ": " in source:
        file, text = source.split(": ", 1)
        assert text in read(file), f"{page}: {figure} is not what {file} says"
    else:
        assert _of_code(source) == pytest.approx(_value(figure)), f"{page}: {figure} is not {source}"


@pytest.mark.parametrize(
    ("page", "phrase", "value", "source"), [(page, *row) for page in IN_WORDS for row in IN_WORDS[page]]
)
def test_a_number_in_words_is_its_sources(page: str, phrase: str, value: float, source: str) -> None:
    text = " ".join(prose(page).split())
    assert text.count(phrase) == 1, f"{page}: {phrase!r} stands there {text.count(phrase)} times"
    assert _of_code(source) == value, f"{page}: {phrase!r} is not {source}"


@pytest.mark.parametrize("page", [name_of(path) for path in PAGES if name_of(path) not in MEASURED])
def test_ratios_and_rates_stand_with_the_runs_that_measured_them(page: str) -> None:
    found = re.findall(r"(?<![\w.])\d[\d.]*x\b(?!\+)|\d+ tokens a second|\d /s\b", prose(page))
    assert not found, f"{page}: {found}; ratios are for {' and '.join(MEASURED)}"


def test_a_wrong_figure_would_be_seen() -> None:
    assert _value("512 KiB") == 512 * 1024 != _of_code("limits:small_body_bytes_max")
    assert _value("15 minutes") == 900
    assert _FIGURE.findall("at most 256 MiB, 1,024 bytes a second, 0.5 min") == [
        ("256", "MiB"), ("1,024", "bytes"), ("0.5", "min")
    ]  # fmt: skip
