"""The trials of a sweep, from their records: what each came to, which is the best, and the table of all of them.

A trial is a job, whose name and start follow from the sweep's start and the trial's number. Its record, with its
values, exists before the job does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from knapper.ids import TinkerPath
from knapper.jobs import control, selection
from knapper.jobs.names import FINAL, Start
from knapper.jobs.progress import newest_step
from knapper.jobs.spec import AnyJob
from knapper.jobs.sweep.points import Point
from knapper.jobs.sweep.spec import Goal, SweepSpec
from knapper.state.job_records import Started, Trial, TrialEnded, read
from knapper.store import Store, many


@dataclass(frozen=True)
class Tried:
    """`n`: from 1. `ended`: None while it has work."""

    n: int
    start: Start
    point: Point
    ended: TrialEnded | None

    @property
    def value(self) -> float | None:
        """Of the metric; None for none, or one that is no number."""
        value = None if self.ended is None else self.ended.value
        return None if value is None or math.isnan(value) else value

    @property
    def checkpoint(self) -> TinkerPath:
        return TinkerPath(self.start.run, "sampler_weights", FINAL)


async def read_all(store: Store, sweep: Start) -> list[Tried]:
    """In order; their numbers have no gaps."""
    listed = set(await store.list(sweep.trials))
    count = sum(name.endswith("/values") for name in listed)

    async def read_one(n: int) -> Tried:
        trial = await read(store, sweep.tried(n), Trial)
        assert trial is not None, "it was listed, and nobody deletes it while the sweep is there"
        ended = await read(store, sweep.trial_ended(n), TrialEnded) if sweep.trial_ended(n) in listed else None
        return Tried(n, sweep.trial(n), msgspec.json.decode(trial.values), ended)

    return await many.each(range(1, count + 1), read_one)


def of_trial(start: Start, started: Started) -> Start | None:
    """The sweep that the job is a trial of; None for any other."""
    job, _, sweep = started.sweep.partition("/")
    return Start(start.tenant, job, sweep) if sweep else None


def metric(job: AnyJob, sweep: SweepSpec) -> tuple[str, Goal]:
    """What trials are compared by, and which way."""
    name = sweep.metric or selection.metric(job)
    return name, sweep.goal or ("minimize" if selection.lower_is_better(name) else "maximize")


def best(goal: Goal, trials: Sequence[Tried]) -> Tried | None:
    """Of those that are completed; of several equal ones the first."""
    done = [trial for trial in trials if trial.value is not None]
    sign = -1.0 if goal == "minimize" else 1.0
    return max(done, key=lambda trial: (sign * (trial.value or 0.0), -trial.n), default=None)


async def table(store: Store, job: AnyJob, trials: Sequence[Tried]) -> dict[str, Any]:
    """What sweep.json and `knapper jobs show` have: the trials in their order, and the best of them so far."""
    assert job.sweep is not None, "only sweeps have trials"
    name, goal = metric(job, job.sweep)
    chosen = best(goal, trials)
    return {
        "metric": name,
        "goal": goal,
        "method": job.sweep.method,
        "planned": job.sweep.planned,
        "ended": sum(trial.ended is not None for trial in trials),
        "device_seconds": round(device_s(trials), 3),
        "best": None if chosen is None else {
            "trial": chosen.n, "job": chosen.start.job, "value": chosen.value, "values": chosen.point,
            "checkpoint": str(chosen.checkpoint),
        },
        "trials": await many.each(trials, lambda trial: _row(store, trial)),
    }  # fmt: skip


async def _row(store: Store, trial: Tried) -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.n, "job": trial.start.job, "values": trial.point}
    if trial.ended is None:
        now = await control.now(store, trial.start)
        step = await newest_step(store, trial.start)
        state = "cancelled" if now.state == "cancelled" else "running"  # or about to be recorded
        return row | {"state": state, "value": None, "step": step, "device_seconds": None, "reason": now.reason}
    ended = trial.ended
    return row | {
        "state": ended.state, "value": trial.value, "step": ended.steps, "device_seconds": round(ended.device_s, 3),
        "reason": ended.reason,
    }  # fmt: skip


def device_s(trials: Sequence[Tried]) -> float:
    """Of those that have ended."""
    return sum(trial.ended.device_s for trial in trials if trial.ended is not None)
