"""The next point of a search, by Optuna. Nothing of its study is stored: it is made anew of the trials so far.

Each trial's point is recorded before it begins, so that it is drawn once, whatever is killed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec

from knapper.errors import InvalidField
from knapper.jobs.sweep.points import Point
from knapper.jobs.sweep.spec import Goal, Range, SweepSpec

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler


@dataclass(frozen=True)
class TriedPoint:
    """A trial so far. `value`: of the metric; None while it runs, or if it has none."""

    point: Point
    value: float | None
    ended: bool


def expect_installed(sweep: SweepSpec) -> None:
    """Raises InvalidField where Optuna is needed and missing."""
    if sweep.method != "grid" and find_spec("optuna") is None:
        todo = "Its operator adds searches with: pip install 'knapper[sweep]'"
        raise InvalidField("sweep.method", sweep.method, "grid, as this server has no optuna", todo)


def draw(sweep: SweepSpec, goal: Goal, tried: Sequence[TriedPoint]) -> Point:
    """The point of the next trial: a function of the sweep's seed and of all trials before it."""
    import optuna
    from optuna.trial import TrialState

    spaces = {field: _space(values) for field, values in sweep.over.items()}
    study = optuna.create_study(direction=goal, sampler=_sampler(sweep, len(tried)))
    for trial in tried:
        state = (
            TrialState.RUNNING if not trial.ended else TrialState.FAIL if trial.value is None else TrialState.COMPLETE
        )
        at = {field: _encoded(sweep.over[field], value) for field, value in trial.point.items()}
        study.add_trial(optuna.trial.create_trial(params=at, distributions=spaces, value=trial.value, state=state))
    drawn = study.ask(spaces).params
    return {field: _decoded(values, drawn[field]) for field, values in sweep.over.items()}


def _sampler(sweep: SweepSpec, n: int) -> "BaseSampler":
    """Seeded for each trial by itself, as no sampler lives as long as a sweep does."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = int.from_bytes(hashlib.sha256(f"{sweep.seed}/{n}".encode()).digest()[:4])
    if sweep.method == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, constant_liar=True)  # which keeps trials side by side apart


def _space(values: list[Any] | Range) -> "BaseDistribution":
    """A list is drawn from by the number of its values, which may be of any type."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Range):
        return CategoricalDistribution(list(range(len(values))))
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log, step=int(values.step or 1))
    step = None if values.step is None else float(values.step)
    return FloatDistribution(float(values.low), float(values.high), log=values.log, step=step)


def _encoded(values: list[Any] | Range, value: Any) -> Any:
    if isinstance(values, Range):
        return value
    return [msgspec.json.encode(each) for each in values].index(msgspec.json.encode(value))


def _decoded(values: list[Any] | Range, drawn: Any) -> Any:
    return drawn if isinstance(values, Range) else values[drawn]
