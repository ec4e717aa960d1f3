"""Autoresearch: many experiments side by side, of which a search learns what to try next.

Optuna's TPE draws learning rate, batch and reward signal of each trial from what those before it scored. The same
search runs twice: several trials at once, and for comparison a few, one at a time.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from recipes import common
from recipes.arithmetic import train as arithmetic

JOB = Path(__file__).parent / "job.yaml"
NAME = "autoresearch"


@dataclass(frozen=True)
class Options:
    """`model`: a served one, the first unless named. `alone`: trials of the comparison, one at a time."""

    model: str = ""
    trials: int = 6
    at_once: int = 3
    alone: int = 2
    steps: int = 6
    largest: int = 9
    held_out: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Sweep:
    """`busy`: the share of the time in which the engine computed for a trial."""

    trials: list[dict[str, Any]]
    curves: dict[str, list[float]]
    best: dict[str, Any]
    busy: float


def sweep(name: str, options: Options) -> Sweep:
    """Run it to its end."""
    sums = replace(arithmetic.Options(), largest=options.largest, held_out=options.held_out, seed=options.seed)
    learned, held_out = arithmetic.rows(sums)
    yaml = common.job(JOB, options.model, {
        "steps": options.steps, "sweep.budget.trials": options.trials, "sweep.at_once": options.at_once,
        "sweep.seed": options.seed, "seed": options.seed,
    })  # fmt: skip
    files = {"job.yaml": yaml, "train.jsonl": common.lines(learned), "held_out.jsonl": common.lines(held_out)}
    done = common.train(name, files)
    assert done.trials is not None, "it is a sweep"
    trials: list[dict[str, Any]] = done.trials["trials"]
    curves = {
        str(trial["trial"]): [step["reward/right"] for step in common.shown(trial["job"])["metrics"]]
        for trial in trials
    }  # fmt: skip
    return Sweep(trials, curves, done.trials["best"], done.trials["device_seconds"] / done.seconds)


def signal(values: Mapping[str, Any]) -> str:
    """A trial's reward in words."""
    terms = [term for term in values["reward"] if term.get("weight", 1)]
    return " + ".join(f"{term.get('weight', 1)} {term['label']}" for term in terms)


def table(swept: Sweep) -> common.Table:
    rows: list[list[common.Cell]] = [
        [
            str(trial["trial"]), f"{trial['values']['optimizer.learning_rate']:.1e}",
            str(trial["values"]["batch.samples"]), signal(trial["values"]), trial["value"],
        ]
        for trial in swept.trials
    ]  # fmt: skip
    return common.Table(["trial", "learning rate", "samples", "reward", "held-out right"], rows)


def run(options: Options) -> common.Result:
    alone = sweep(f"recipe-{NAME}-alone", replace(options, trials=options.alone, at_once=1))
    together = sweep(f"recipe-{NAME}", options)
    rows: list[list[common.Cell]] = [
        ["the engine's busy share", alone.busy, together.busy],
        ["trials", str(len(alone.trials)), str(len(together.trials))],
        ["best held-out sums right", alone.best["value"], together.best["value"]],
    ]
    figures = common.Table(["", "one at a time", f"{options.at_once} side by side"], rows)
    model = common.model_of(options.model)
    curves = {f"trial {name}": values for name, values in together.curves.items()}
    return common.Result(NAME, model, asdict(options), figures, curves, {"trials": table(together)})


if __name__ == "__main__":
    common.save(run(common.options(Options, __doc__)))
