"""`python -m benchmarks.page [out/bench.json]`: the tables of docs/performance.md, from what a run stored.

Between the markers nothing is typed by hand; what stands around them is prose.
"""

import json
import sys
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent.parent / "docs/performance.md"
BEGIN, END = "<!-- figures: written by make bench-page -->", "<!-- end of the figures -->"
_MACHINE = (
    "{cpu}, {cores} cores, {capability}, torch {torch}, transformers {transformers}, peft {peft}, Python {python}"
)


def tables(stored: Mapping[str, Any]) -> str:
    """Of what `python -m benchmarks` stored."""
    machine = _MACHINE.format(**stored["machine"])
    load = f"load {stored['machine']['load_1min']:.1f} before and {stored['load_1min_after']:.1f} after"
    kind = "`--quick`, smaller and with few repeats" if stored["quick"] else "the full run"
    lines = [f"{machine}; {load}; model {stored['model']}; {kind}, {stored['took_s']} s."]
    for name, reason in stored["failed"].items():
        lines += ["", f"**Section {name} failed**, and has only the figures from before that: {_cell(reason)}"]
    for section, figures in groupby(stored["figures"], key=lambda one: one["section"]):
        lines += ["", f"### {section.capitalize()}", ""]
        lines += ["| | ours | bare | better | goal | stretch | |", "|---|--:|--:|--:|---|---|---|"]
        lines += [_row(one) for one in figures]
    return "\n".join(lines) + "\n"


def written(page: str, stored: Mapping[str, Any]) -> str:
    """The page with the tables between its markers. Raises ValueError if it has not both, once and in order."""
    before, found, rest = page.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed or BEGIN in rest or END in after:
        raise ValueError(f"the page needs one {BEGIN!r} and after it one {END!r}")
    return f"{before}{BEGIN}\n{tables(stored)}{END}{after}"


def _row(one: Mapping[str, Any]) -> str:
    ours = f"{one['ours']:.3g} {one['unit']}".strip()
    bare = "" if one["bare"] is None else f"{one['bare']:.3g} {one['unit']}".strip()
    ratio = "" if one["ratio"] is None else f"**{one['ratio']:.2f}x**"
    cells = [one["name"], ours, bare, ratio, one["goal"], one["stretch"], one["remarks"]]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main() -> None:
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "out/bench.json")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), json.loads(source.read_text())), encoding="utf-8")
    print(f"{PAGE} has the figures of {source}")


if __name__ == "__main__":
    main()
