"""`make bench-gpu`: what one card says of the engine, in one run of less than ten minutes, without a download.

    python -m benchmarks.gpu [--sizes qwen3-8b] [--device cuda] [--only start packed ...] [--budget-s 540]
        [--out out/gpu.json] [--wheels DIRECTORY] [--page]

Random weights at true sizes, made on the device; any torch from 2.11 on with CUDA. It needs transformers and peft for
the comparison, and msgspec, structlog and some more small packages that a bare machine may lack: `make
bench-gpu-wheels` collects them in out/gpu-wheels, which travels with the checkout. `--device cpu --sizes tiny` tries
the script itself.

Phases are isolated: one that fails, hangs or kills its process costs the others nothing but a new process. Results are
written after each figure, so that a run that is cut off leaves what it found. `--page` then writes docs/gpu.md.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from benchmarks.gpu import wheels

# In the order of what is most worth knowing. Each group has a process for itself.
GROUPS: Final = (
    ("start", "peaks", "kernels", "packed", "tenants", "agreement", "sampling", "grpo", "kept", "durable"),
    ("parity", "bare"),
    ("exact",),
)
_VARIABLES: Final = {"exact": {"KNAPPER_BATCH_INVARIANT": "true"}}  # of a group's process, by its first phase
# The longest that a phase may take: several times what it should, so that one that hangs leaves time for the others.
_LIMIT_S: Final = {"start": 150, "sampling": 150, "bare": 120}
_LIMIT_OTHERS_S: Final = 100
_NEEDED_S: Final = 10  # less is left: no phase begins


@dataclass
class Results:
    """All reports so far, as they are stored."""

    path: Path
    header: dict[str, Any]
    figures: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)

    def take(self, report: dict[str, Any], now_s: float) -> None:
        if "machine" in report:
            self.header["machine"] = report["machine"]
        if "begun" in report:
            self.took_s[report["begun"]] = -now_s
        if "figure" in report:
            self.figures.append(report["figure"])
            print(_line(report["figure"]), flush=True)
        if "failed" in report:
            self.failed[report["failed"]] = report["reason"]
            print(f"phase {report['failed']} failed: {report['reason']}", file=sys.stderr, flush=True)
        for name in (report.get("ended"), report.get("failed")):
            if name is not None:
                self.took_s[name] = round(self.took_s.get(name, -now_s) + now_s, 1)
        self.write()

    def write(self) -> None:
        """Whole, or not at all: a run may be cut off at any moment."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {**self.header, "failed": self.failed, "phases_s": self.took_s, "figures": self.joined()}
        draft = self.path.with_suffix(".new")
        draft.write_text(json.dumps(document, indent=2) + "\n")
        draft.replace(self.path)

    def joined(self) -> list[dict[str, Any]]:
        """The figures, with those of the bare loop beside ours of the same name."""
        bare = {
            figure["name"]: figure["ours"] for figure in self.figures if figure["section"].startswith("a bare loop")
        }
        return [
            {**figure, "bare": bare[figure["name"]], "ratio": figure["ours"] / bare[figure["name"]]}
            if figure["section"] == "training" and figure["name"] in bare
            else figure
            for figure in self.figures
        ]


@dataclass
class Worker:
    """A process over the rest of a group's phases. `lines`: what it says; None at its end."""

    process: subprocess.Popen[str]
    lines: "queue.Queue[str | None]"

    @classmethod
    def begin(cls, phases: Sequence[str], args: argparse.Namespace, scratch: Path) -> "Worker":
        command = [
            sys.executable, "-m", "benchmarks.gpu.worker", "--sizes", args.sizes, "--device", args.device,
            "--dtype", args.dtype, "--scratch", str(scratch), "--phases", *phases,
        ]  # fmt: skip
        environment = {**os.environ, **_VARIABLES.get(phases[0], {})}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        lines: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None
        threading.Thread(target=_forward, args=(process.stdout, lines), daemon=True).start()
        return cls(process, lines)

    def reports(self, limits_s: dict[str, float], end_s: float) -> Iterator[dict[str, Any]]:
        """Until it ends, or is ended: a phase that takes longer than its limit, or than there is time, has failed."""
        phase, until = "", end_s
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, min(until, end_s) - time.monotonic()))
            except queue.Empty:
                line, reason = None, "it took longer than its limit, or than the run had left"
            else:
                reason = "its process ended"
            if line is None:
                self.end()
                if phase:
                    yield {"failed": phase, "reason": f"{reason} (exit status {self.process.returncode})"}
                return
            if not line.startswith("@"):
                sys.stderr.write(line)
                continue
            report = json.loads(line[1:])
            if "begun" in report:
                phase = report["begun"]
                until = time.monotonic() + limits_s.get(phase, _LIMIT_OTHERS_S)
            if "ended" in report or "failed" in report:
                phase, until = "", end_s
            yield report

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def _forward(stream: IO[str], lines: "queue.Queue[str | None]") -> None:
    with stream:
        for line in stream:
            lines.put(line)
    lines.put(None)


def run(args: argparse.Namespace, results: Results, scratch: Path) -> None:
    end_s = time.monotonic() + args.budget_s
    for group, name in zip(GROUPS, ("engine", "plain", "exact"), strict=True):
        rest = [phase for phase in group if not args.only or phase in args.only]
        while rest and end_s - time.monotonic() > _NEEDED_S:
            place = scratch / f"{name}-{len(rest)}"
            place.mkdir()
            begun = []
            for report in Worker.begin(rest, args, place).reports(dict(_LIMIT_S), end_s):
                if "refused" in report:
                    raise SystemExit(f"no figures: {report['refused']}")
                if "begun" in report:
                    begun.append(report["begun"])
                results.take(report, time.monotonic())
            if not begun:
                results.take({"failed": rest[0], "reason": "its process ended before it began"}, time.monotonic())
                begun.append(rest[0])
            rest = [phase for phase in rest if phase not in begun]
        for phase in rest:
            results.take({"failed": phase, "reason": "there was no time left for it"}, time.monotonic())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--sizes", choices=["qwen3-8b", "qwen3-1.7b", "tiny"], default="qwen3-8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--only", nargs="+", choices=[phase for group in GROUPS for phase in group], default=[])
    parser.add_argument("--budget-s", type=float, default=540.0, help="what does not begin within is left out")
    parser.add_argument("--out", type=Path, default=Path("out/gpu.json"))
    parser.add_argument("--wheels", type=Path, default=wheels.DIRECTORY, help="packages that this machine may lack")
    parser.add_argument("--page", action="store_true", help="write the figures into docs/gpu.md afterwards")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="knapper-bench-gpu-") as scratch:
        wheels.use(args.wheels, Path(scratch) / "packages")
        results = Results(args.out, {"sizes": args.sizes, "machine": {}, "budget_s": args.budget_s})
        run(args, results, Path(scratch))
    results.header["took_s"] = round(time.monotonic() - began)
    results.write()
    print(f"{len(results.figures)} figures in {args.out}, {results.header['took_s']} s")
    if args.page:
        from benchmarks import page

        page.write(page.GPU)
    if results.failed:
        raise SystemExit(1)


def _line(figure: dict[str, Any]) -> str:
    value = f"{figure['ours']:,.0f}" if figure["ours"] >= 1000 else f"{figure['ours']:.3g}"
    aims = "; ".join(filter(None, [figure["goal"] and f"goal {figure['goal']}", figure["note"]]))
    return f"{figure['section'][:22]:24}{figure['name']:66}{value:>10} {figure['unit']:8}{aims}"


if __name__ == "__main__":
    main()
