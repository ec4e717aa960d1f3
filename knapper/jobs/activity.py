"""What a running job is doing, since when, and when it may end, from its records in the store.

A function that begins to work on a job records the time. Where the functions are processes of this machine, the caller
also says whether they run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, Final, Literal

from knapper.ids import number
from knapper.jobs import progress, schedule
from knapper.jobs.bill import covered
from knapper.jobs.names import Start
from knapper.jobs.presence import Presence
from knapper.jobs.progress import Outline, Progress
from knapper.jobs.spec import AnyJob, RlJob
from knapper.state.job_records import Evaluated, Trained
from knapper.state.layout import last_number
from knapper.store import Store

Phase = Literal[
    "waiting", "waiting for the engine", "loading the model", "evaluating", "sampling", "scoring", "training", "saving"
]
Function = Literal["train_step", "sample", "reward"]
IDLE: Final[tuple[Phase, ...]] = ("waiting", "waiting for the engine", "loading the model")
RECENT: Final = 10  # steps from which the duration of the next ones is estimated


@dataclass(frozen=True)
class Activity:
    """`since`: seconds since the epoch. `step`: from 1; of an evaluation, those before it. `done`, `of`: prompts."""

    phase: Phase
    since: float = 0.0
    step: int | None = None
    done: int | None = None
    of: int | None = None

    def told(self) -> dict[str, Any]:
        return {"phase": self.phase, "step": self.step, "done": self.done, "of": self.of, "since": iso(self.since)}


def iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


async def take_up(store: Store, start: Start, function: str, at: float) -> None:
    """Record that the function works on the job from now on."""
    await store.put_if_absent(f"{start.taken(function)}{number(int(at * 1e6))}", b"")


async def activity(
    store: Store,
    outline: Outline,
    now: Progress,
    steps: int,
    moved_at: float,
    present: Callable[[str], Presence | None],
) -> Activity:
    """`moved_at`: when the job was started, resumed, or last made progress."""
    function, work = next_work(outline, now, steps)
    marks = await store.list(outline.start.taken(function))
    taken_at = last_number(marks[-1]) / 1e6 if marks else None
    presence = present(function)
    if function != "reward":  # reward has no model to wait for
        if presence is not None and presence.state == "loading":
            return Activity("loading the model", presence.since or moved_at)
        if presence.state == "absent" if presence is not None else taken_at is None:
            return Activity("waiting for the engine", moved_at)
    return replace(work, since=max(moved_at, taken_at or 0.0))


def next_work(outline: Outline, now: Progress, steps: int) -> tuple[Function, Activity]:
    """The function at work and its activity (of several: the longest); the caller fills in `since`."""
    steps = now.end(steps)
    open_versions = list(progress.evaluations(outline, now, steps))
    if isinstance(outline.job, RlJob):
        return _rl_work(outline, outline.job, now, open_versions)
    if open_versions:
        return "train_step", Activity("evaluating", step=open_versions[0], of=outline.held_out)
    return "train_step", Activity("training", step=now.trained + 1) if now.trained < steps else Activity("saving")


def _rl_work(outline: Outline, job: RlJob, now: Progress, open_versions: Sequence[int]) -> tuple[Function, Activity]:
    """The sampler prefers steps to evaluations, and finishes a round that it has begun."""
    step, steps, prompts = now.trained, now.end(job.steps), job.batch.prompts
    parts = now.parts("steps", step)
    begun = 0 < len(parts.rollouts) < prompts
    for version in open_versions:
        evaluated = now.parts("evaluations", version)
        missing = len(evaluated.rollouts) < outline.held_out
        sampled = step >= steps or len(parts.rollouts) == prompts
        if not missing and step < steps and job.stop_early is None:
            continue
        if not begun and (version < step or evaluated.rollouts or sampled):
            function: Function = "sample" if missing else "reward"
            done = evaluated.rollouts if missing else evaluated.scores
            return function, Activity("evaluating", step=version, done=len(done), of=outline.held_out)
    if step >= steps:
        return "train_step", Activity("saving")
    if len(parts.rollouts) < prompts:
        return "sample", Activity("sampling", step=step + 1, done=len(parts.rollouts), of=prompts)
    if len(parts.scores) < prompts:
        return "reward", Activity("scoring", step=step + 1, done=len(parts.scores), of=prompts)
    return "train_step", Activity("training", step=step + 1)


def seconds_left(
    job: AnyJob, recent: Sequence[Trained], evaluated: Mapping[int, Evaluated], trained: int, steps: int, spent_s: float
) -> float | None:
    """Estimated from the newest steps and evaluations; None before the first.

    `recent`: the last steps done. `spent_s`: on the current activity. All evaluations of rl but the last run beside its
    steps and are part of their duration.
    """
    if not recent:
        return None
    step_s = fmean(map(_step_s, recent))
    evaluation_s = fmean([_evaluation_s(each) for each in evaluated.values()]) if evaluated else 0.0
    ahead = [steps] if isinstance(job, RlJob) else range(trained, steps + 1)
    open_count = sum(schedule.evaluated(job, version, steps) and version not in evaluated for version in ahead)
    current_s = step_s if trained < steps else evaluation_s
    return max(0.0, (steps - trained) * step_s + open_count * evaluation_s - min(spent_s, current_s))


def _step_s(trained: Trained) -> float:
    """Seconds since the previous step or evaluation, not counting a wait for the engine to start."""
    began_at = min([trained.began_at, *(began for began, _ in trained.spent.busy)])
    return trained.ended_at - max(trained.before_at, began_at)


def _evaluation_s(evaluated: Evaluated) -> float:
    return covered([(evaluated.began_at, evaluated.ended_at), *evaluated.spent.busy])
