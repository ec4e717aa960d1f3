"""The section `sweep` of job.yaml: which fields get which values, what is best, and when it is enough."""

import math
import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from knapper import limits
from knapper.errors import InvalidField
from knapper.jobs.spec_part import Seed, SpecPart
from knapper.wire import json

Method = Literal["grid", "random", "tpe"]
Goal = Literal["minimize", "maximize"]
OVER = "sweep.over"
_FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}(\.[a-z][a-z0-9_]{0,63}){0,3}")
_COMMON = ("kind", "base_model", "evaluate", "sweep")  # the same in all trials, or they could not be compared


class Range(SpecPart, frozen=True, kw_only=True):
    """From `low` to `high`, both included; of whole numbers if both are."""

    low: int | float
    high: int | float
    log: bool = False  # even in its logarithm
    step: int | float | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Values = Annotated[list[Any], Meta(min_length=1, max_length=limits.sweep_values_max)]


class SweepBudget(SpecPart, frozen=True, kw_only=True):
    """No trial begins beyond it. Those that run then go on to their end."""

    trials: Annotated[int, Meta(ge=1, le=limits.sweep_trials_max)] | None = None
    device_seconds: Annotated[float, Meta(gt=0, le=1e9)] | None = None  # that ended trials have used


class SweepSpec(SpecPart, frozen=True, kw_only=True):
    """`over`: dotted fields of the job, each with a list of values or a range."""

    over: Annotated[dict[str, Values | Range], Meta(min_length=1, max_length=limits.sweep_fields_max)]
    method: Method = "grid"  # or points that optuna's samplers draw
    budget: SweepBudget = SweepBudget()
    at_once: Annotated[int, Meta(ge=1, le=limits.sweep_at_once_max)] = 4  # trials side by side
    metric: Annotated[str, Meta(max_length=limits.text_chars_max)] | None = None  # of the evaluation
    goal: Goal | None = None
    seed: Seed = 0  # of what the samplers draw

    @property
    def planned(self) -> int | None:
        """How many trials there are; None if only their device seconds are bounded."""
        if self.method != "grid":
            return self.budget.trials
        points = math.prod(len(values) for values in self.over.values() if isinstance(values, list))
        return points if self.budget.trials is None else min(points, self.budget.trials)


def parse(content: Any) -> SweepSpec:
    """The section, checked in itself. Raises InvalidField."""
    over = content.get("over") if isinstance(content, dict) else None
    for field, values in over.items() if isinstance(over, dict) else ():
        if not _FIELD.fullmatch(field):
            raise InvalidField(OVER, field, "names of fields, as `optimizer.learning_rate` is one")
        if not isinstance(values, list | dict):
            allowed = "a list of values, or a range: {low: ..., high: ...}"
            raise InvalidField(f"{OVER}.{field}", values, allowed)
        json.shape(values, Values if isinstance(values, list) else Range, f"{OVER}.{field}")  # msgspec names no key
    sweep = json.decode(msgspec.json.encode({"sweep": content}), _Section).sweep
    _check(sweep)
    return sweep


class _Section(msgspec.Struct):
    sweep: SweepSpec


def _check(sweep: SweepSpec) -> None:
    """What the types do not say. Raises InvalidField."""
    fields = list(sweep.over)
    for field, values in sweep.over.items():
        at = f"{OVER}.{field}"
        if field.partition(".")[0] in _COMMON:
            raise InvalidField(at, "there", f"fields that trials may differ in: none of {', '.join(_COMMON)}")
        if inner := next((other for other in fields if other.startswith(f"{field}.")), None):
            raise InvalidField(f"{OVER}.{inner}", "there", f"none beside {field}, which it is a part of")
        if isinstance(values, Range):
            _check_range(at, values, sweep.method)
        elif len({msgspec.json.encode(value) for value in values}) < len(values):
            raise InvalidField(at, values, "each value once")
    if sweep.method == "grid":
        _check_size(sweep)
    elif sweep.budget == SweepBudget():
        todo = "A search would go on for ever"
        raise InvalidField(
            "sweep.budget", None, "`trials` or `device_seconds`, or both, unless the method is grid", todo
        )


def _check_range(at: str, values: Range, method: Method) -> None:
    if method == "grid":
        todo = "Or draw from the range: `method: tpe` or `method: random`"
        raise InvalidField(at, "a range", "a list of values, as the method is grid", todo)
    if not values.low < values.high:
        raise InvalidField(f"{at}.high", values.high, f"above low, which is {values.low}")
    if values.log and values.low <= 0:
        raise InvalidField(f"{at}.low", values.low, "above 0 where `log` is true")
    if values.step is None:
        return
    if values.log:
        raise InvalidField(f"{at}.step", values.step, "none where `log` is true")
    if not 0 < values.step <= values.high - values.low or (values.whole and not isinstance(values.step, int)):
        allowed = f"{'a whole number ' if values.whole else ''}above 0, to {values.high - values.low}"
        raise InvalidField(f"{at}.step", values.step, allowed)


def _check_size(sweep: SweepSpec) -> None:
    points = math.prod(len(values) for values in sweep.over.values() if isinstance(values, list))
    if points > limits.sweep_trials_max:
        todo = "Leave values out, or draw some of the points: `method: random`"
        raise InvalidField(OVER, f"a grid of {points} points", f"at most {limits.sweep_trials_max}", todo)
