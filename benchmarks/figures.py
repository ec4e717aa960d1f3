"""What a benchmark says: figures, each beside the bare loop that it is compared with, from the same run."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

Timed = Callable[[], object]


@dataclass(frozen=True)
class Figure:
    """`ours` and `bare` in `unit`; `ratio` says how many times better we are, whichever way that is."""

    section: str
    name: str
    ours: float
    bare: float | None
    unit: str
    ratio: float | None = None
    goal: str = ""
    note: str = ""

    def line(self) -> str:
        bare = "" if self.bare is None else f"{self.bare:.3g}"
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        return f"{self.name:58}{self.ours:>10.3g}{bare:>10} {self.unit:8}{ratio:>8}  {self.goal:22}{self.note}"


HEADER = f"{'':58}{'ours':>10}{'bare':>10} {'':8}{'better':>8}  {'goal':22}"


def seconds(call: Timed) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def paired(ours: Timed, bare: Timed, repeats: int, warm_up: int = 1) -> tuple[float, float]:
    """Medians of seconds, taken in turns: ours, bare, ours, bare, ..."""
    pairs = [(seconds(ours), seconds(bare)) for _ in range(warm_up + repeats)][warm_up:]
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    return first, second


def faster(section: str, name: str, ours_s: float, bare_s: float, goal: str = "", note: str = "") -> Figure:
    """Of two durations."""
    return Figure(section, name, ours_s, bare_s, "s", bare_s / ours_s, goal, note)


def machine() -> dict[str, object]:
    """Where the figures are from, and how busy it was otherwise."""
    model = next((line for line in _cpuinfo() if line.startswith("model name")), "")
    return {
        "cpu": model.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "load_1min": os.getloadavg()[0],
    }


def _cpuinfo() -> Iterable[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def store(figures: Iterable[Figure], path: Path, said_of_the_machine: dict[str, object]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": said_of_the_machine, "figures": [asdict(one) for one in figures]}, indent=2))
