"""Figures of a benchmark, each beside its bare loop, from the same run."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.page import NOISY

Timed = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """`ours` and `bare` in `unit`; `ratio`: how many times better ours is, lower or higher."""

    section: str
    name: str
    ours: float
    bare: float | None
    unit: str
    ratio: float | None = None
    goal: str = ""
    stretch: str = ""
    spread: float | None = None
    note: str = ""

    @property
    def remarks(self) -> str:
        """The note, and the spread of repeats where it is large."""
        noisy = self.spread is not None and self.spread > NOISY
        return "; ".join(
            filter(None, [self.note, f"repeats differ by {100 * (self.spread or 0):.0f} %" if noisy else ""])
        )

    def line(self) -> str:
        bare = "" if self.bare is None else f"{self.bare:.3g}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        aims = f"{self.goal:22}{self.stretch:10}"
        return f"{self.name:66}{self.ours:>10.3g}{bare:>10} {self.unit:6}{ratio:>8}  {aims}{self.remarks}"


HEADER = f"{'':66}{'ours':>10}{'bare':>10} {'':6}{'better':>8}  {'goal':22}{'stretch':10}"


class Pair(NamedTuple):
    """Medians of seconds, and the spread of the repeats' ratios: half their range over their median."""

    ours_s: float
    bare_s: float
    spread: float | None


def seconds(call: Timed) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def paired(ours: Timed, bare: Timed, repeats: int, warm_up: int = 1) -> Pair:
    """Taken in turns: ours, bare, ours, bare, ..."""
    pairs = [(seconds(ours), seconds(bare)) for _ in range(warm_up + repeats)][warm_up:]
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = [bare_s / ours_s for ours_s, bare_s in pairs]
    spread = (max(ratios) - min(ratios)) / 2 / statistics.median(ratios) if repeats > 1 else None
    return Pair(first, second, spread)


def faster(section: str, name: str, pair: Pair, goal: str = "", stretch: str = "", note: str = "") -> Figure:
    """A figure of two durations."""
    ratio = pair.bare_s / pair.ours_s
    return Figure(section, name, pair.ours_s, pair.bare_s, "s", ratio, goal, stretch, pair.spread, note)


def machine() -> dict[str, object]:
    """The machine, and its load."""
    model = next((line for line in _cpuinfo() if line.startswith("model name")), "")
    has_amx = torch.cpu.get_capabilities().get("amx_bf16", False)
    return {
        "cpu": model.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("knapper", "transformers", "peft", "tinker")},
        "python": platform.python_version(),
        "capability": " and ".join([torch.backends.cpu.get_cpu_capability(), *(["AMX"] if has_amx else [])]),
        "load_1min": os.getloadavg()[0],
    }


def _cpuinfo() -> Iterable[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def versions(python: Path, *names: str) -> dict[str, str]:
    """Versions of packages in another environment."""
    code = (
        "import sys, importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions()), sep='\\n')"
    )
    stdout = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    installed = dict(line.split(" ", 1) for line in stdout.splitlines())
    return {name: installed[name] for name in names if name in installed}


def store(figures: Iterable[Figure], path: Path, **header: object) -> None:
    """Writes the header of the run and its figures as JSON."""
    write(path, **header, figures=[{**asdict(figure), "remarks": figure.remarks} for figure in figures])


def write(path: Path, **document: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
