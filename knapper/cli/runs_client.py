"""What the gateway tells of runs, in lines for a terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

from knapper import ids
from knapper.cli.jobs_client import JobsClient
from knapper.cli.tables import table
from knapper.errors import UserError
from knapper.text.curves import curve
from knapper.text.durations import clock

FIRST: Final = ("loss/mean", "reward/mean", "kl_sample_train_v2/mean", "staleness", "grad_norm", "tokens/second")
_NO_METRICS: Final = frozenset({"step", "at", "tokens"})
_WIDTH: Final = 60
_NAME_CHARS: Final = 24
_RECENT: Final = 20  # steps that an estimate of the end is made of
Point = Mapping[str, Any]


class RunsClient(JobsClient):
    """Asks for runs, with the same key and the same errors as for jobs."""

    def runs(self, limit: int) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", f"training_runs?limit={limit}")["training_runs"]
        return found

    def run(self, run: str) -> dict[str, Any]:
        return self.ask("GET", f"training_runs/{quote(ids.run_id(run))}")

    def progress(self, run: str) -> dict[str, Any]:
        """`points`, one a step; `alarms`, newest first; `state` and `reason`, for people. Raises what `ask` does."""
        return self.ask("GET", f"{self.url}/runs/{quote(ids.run_id(run))}/curve")


def overview(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table with one line a run; nothing without runs."""
    rows = [
        (
            run["training_run_id"], run["base_model"], str(run["lora_rank"]), run["last_request_time"][:19],
            f"{run['alarms']} alarms" if run.get("alarms", 0) > 1 else "1 alarm" if run.get("alarms") else "",
        )
        for run in runs
    ]  # fmt: skip
    if rows:
        yield from table(("RUN", "BASE MODEL", "RANK", "LAST REQUEST", ""), rows)


def summary(run: Mapping[str, Any], progress: Mapping[str, Any]) -> Iterator[str]:
    """State and alarms."""
    points = progress["points"]
    steps = f"step {int(points[-1]['step'])}" if points else "no steps yet, or none that are still kept"
    reason = f": {progress['reason']}" if progress["reason"] else ""
    yield f"{run['training_run_id']}: {progress['state']}{reason}, {steps}"
    yield f"{run['base_model']}, rank {run['lora_rank']}"
    yield from alarm_lines(progress["alarms"])


def alarm_lines(alarms: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Oldest first."""
    for alarm in reversed(alarms):
        yield f"alarm {alarm['name']} at step {alarm['step']}: {alarm['message']}"


def metrics_of(points: Sequence[Point], wanted: Sequence[str]) -> list[str]:
    """Those to draw: the wanted ones, or the most asked for. Raises UserError for one that no step has."""
    there = {name for point in points for name, value in point.items() if isinstance(value, (int, float))} - _NO_METRICS
    for name in wanted:
        if points and name not in there:
            raise UserError(f"no step has the metric {name!r}; allowed: {', '.join(sorted(there))}")
    return list(wanted) or [name for name in FIRST if name in there]


def curves(points: Sequence[Point], names: Sequence[str], height: int = 3) -> Iterator[str]:
    """A curve of each metric, with its range and its last value."""
    for name in names:
        values = _values(points, name)
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            continue
        rows = curve(values, _WIDTH, height)
        labels = [f"{max(finite):.4g}", *[""] * (height - 2), f"{min(finite):.4g}"]
        yield f"{name}  {finite[-1]:.4g}"
        yield from (f"  {label:>10} |{row}" for label, row in zip(labels, rows, strict=True))


def sparks(points: Sequence[Point], names: Sequence[str]) -> Iterator[str]:
    """A line of each metric: from where to where, and on which way."""
    for name in names:
        values = _values(points, name)
        if sum(map(math.isfinite, values)) > 1:
            first, *_, last = [value for value in values if math.isfinite(value)]
            yield f"{name:{_NAME_CHARS}} {curve(values, _WIDTH)[0]}  {first:.4g} -> {last:.4g}"


def comparison(progress: Mapping[str, Mapping[str, Any]], name: str) -> Iterator[str]:
    """A line of each run, on one scale."""
    of = {run: _values(each["points"], name) for run, each in progress.items()}
    finite = [value for values in of.values() for value in values if math.isfinite(value)]
    if not finite:
        raise UserError(f"none of these runs has the metric {name!r} in its journal")
    low, high = min(finite), max(finite)
    yield f"{name}, from {low:.4g} to {high:.4g}"
    longest = max(map(len, of.values()))
    for run, values in of.items():
        width = max(1, round(_WIDTH * len(values) / longest)) if values else 0
        own = [value for value in values if math.isfinite(value)]
        last = f"{own[-1]:.4g} after {len(values)} steps" if own else "no such steps"
        yield f"{run}  {last}"
        yield from (f"  |{row}" for row in curve(values, width, 2, low, high))


def step_line(point: Point, steps: int | None) -> str:
    """What a step did. `steps`: how many there will be, if that is known."""
    shown = "  ".join(f"{name} {point[name]:.4g}" for name in FIRST if name in point)
    return f"step {int(point['step']):>5}{f'/{steps}' if steps else ''}  {shown}"


def left(points: Sequence[Point], steps: int | None) -> str:
    """When step `steps` may be done, by the pace of the newest; empty without an estimate."""
    recent = points[-_RECENT:]
    if steps is None or len(recent) < 2 or recent[-1]["step"] >= steps:
        return ""
    pace_s = (recent[-1]["at"] - recent[0]["at"]) / (recent[-1]["step"] - recent[0]["step"])
    return f"ends in about {clock(pace_s * (steps - recent[-1]['step']))}"


def _values(points: Sequence[Point], name: str) -> list[float]:
    return [float(point.get(name, math.nan)) for point in points]
