"""Which version of the adapter is the best, and when a job stops early: functions of its evaluations alone.

Version 0, which nothing has trained, is neither: there is no adapter to publish in it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from knapper.errors import damaged
from knapper.jobs.names import Start
from knapper.jobs.spec import AnyJob, DpoJob, RlJob
from knapper.state.job_records import Evaluated, read
from knapper.state.layout import last_number
from knapper.store import Store, many

_LOWER_IS_BETTER: Final = frozenset({"loss/mean"})


@dataclass(frozen=True)
class Ending:
    """`version`: whose weights are published. `reason`: why not the last planned one; empty if it is."""

    version: int
    reason: str


def selects(job: AnyJob) -> bool:
    """Whether the evaluations decide anything."""
    return job.keep == "best" or job.stop_early is not None


def metric(job: AnyJob) -> str:
    """The name of what is compared."""
    if isinstance(job, RlJob):
        return "reward/mean"
    return job.evaluate.metric if isinstance(job, DpoJob) and job.evaluate is not None else "loss/mean"


def lower_is_better(name: str) -> bool:
    return name in _LOWER_IS_BETTER


def best(job: AnyJob, evaluations: Mapping[int, Evaluated]) -> int | None:
    """The best version, of several equal ones the first; None before the first evaluation of a trained one."""
    scores = _scores(job, evaluations)
    return max(scores, key=lambda version: (scores[version], -version), default=None)


def described(job: AnyJob, evaluations: Mapping[int, Evaluated]) -> dict[str, Any] | None:
    """The best version, for evaluation.json."""
    version, name = best(job, evaluations), metric(job)
    return None if version is None else {"step": version, "metric": name, "value": evaluations[version].metrics[name]}


def stops(job: AnyJob, evaluations: Mapping[int, Evaluated]) -> bool:
    """Whether the newest `patience` evaluations were not better, by more than `min_delta`, than the best before them.

    As Keras and Lightning have it: a smaller gain does not move the mark that the next ones are compared with.
    """
    if job.stop_early is None:
        return False
    mark, waited = -math.inf, 0
    for n, score in enumerate(_scores(job, evaluations).values()):
        if not n or score > mark + job.stop_early.min_delta:
            mark, waited = score, 0
        else:
            waited += 1
    return waited >= job.stop_early.patience


def ending(job: AnyJob, evaluations: Mapping[int, Evaluated], trained: int, planned: int) -> Ending:
    """`trained`, `planned`: steps."""
    name, reasons, version = metric(job), [], trained
    if trained < planned:
        assert job.stop_early is not None, "nothing else ends a job before its last step"
        reasons.append(
            f"stopped early after step {trained} of {planned}: {name} had not improved in {job.stop_early.patience} "
            "evaluations"
        )
    if job.keep == "best" and (chosen := best(job, evaluations)) is not None:
        version, value = chosen, evaluations[chosen].metrics[name]
        reasons.append(f"the adapter is that of step {chosen}, the best: {name} {value:.4g}")
    return Ending(version, "; ".join(reasons))


async def history(store: Store, start: Start) -> dict[int, Evaluated]:
    """All evaluations by version, in order. Raises Corrupt: a choice among those that are left would be another one."""
    names = [name for name in await store.list(start.rounds("evaluations")) if name.endswith("/evaluated")]

    async def read_one(name: str) -> tuple[int, Evaluated]:
        evaluated = await read(store, name, Evaluated)
        if evaluated is None:
            raise damaged(name, "it was listed, and is missing")
        return last_number(name.removesuffix("/evaluated")), evaluated

    return dict(await many.each(names, read_one))


def _scores(job: AnyJob, evaluations: Mapping[int, Evaluated]) -> dict[int, float]:
    """Of trained versions, in order; higher is better, and what is not a number is worse than all."""
    name = metric(job)
    sign = -1.0 if lower_is_better(name) else 1.0
    values = {version: evaluations[version].metrics[name] for version in sorted(evaluations) if version}
    return {version: -math.inf if math.isnan(value) else sign * value for version, value in values.items()}
