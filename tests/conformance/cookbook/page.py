"""docs/cookbook.md, from the figures of a run."""

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path

import tinker

from tests.conformance.cookbook.loops import LOOPS, Seen
from tests.conformance.cookbook.workplace import COOKBOOK, MODEL

PATH = Path(__file__).parents[3] / "docs" / "cookbook.md"
COMMAND = "python -m tests.conformance.cookbook"
_NOTES = Path(__file__).with_name("notes.md")
_ROW = re.compile(r"^\| (.+?) \| .+ \| (\d+) \| (\S+) \| (\S+) \|", re.MULTILINE)


def version() -> str:
    found = importlib.metadata.distributions(name="tinker-cookbook", path=[str(COOKBOOK)])
    return next(iter(found)).version


def render(figures: Mapping[str, Seen]) -> str:
    """The whole page, of loops by name."""
    lines = [
        "# The cookbook",
        "",
        f"<!-- Written by `{COMMAND}`, which runs every loop; tests/conformance/test_cookbook.py runs them in CI. -->",
        "",
        f"`tinker-cookbook=={version()}`, unmodified, with `tinker=={tinker.__version__}` against `knapper up`, which",
        f"serves a tiny random model under the name `{MODEL}`. Each line is a command of the cookbook,",
        "run to its end, and the figure that it logs at its first step and at its last.",
        "",
        "| loop | recipe | figure | steps | first | last | what the test sees |",
        "|---|---|---|---|---|---|---|",
    ]
    for loop in LOOPS:
        seen = figures[loop.name]
        first, last = f"{seen.first:.3g}", f"{seen.last:.3g}"
        lines.append(
            f"| {loop.name} | {loop.recipe} | {loop.figure} | {seen.steps} | {first} | {last} | {loop.effect} |"
        )
    return "\n".join([*lines, "", _NOTES.read_text(encoding="utf-8")])


def figures_of(page: str) -> dict[str, Seen]:
    """The figures that the page gives, by loop."""
    return {name: Seen(float(first), float(last), int(steps)) for name, steps, first, last in _ROW.findall(page)}
