"""Reinforcement learning from a reward that can be verified: sums, learned from whether the answer is right."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes import common

NAME = "arithmetic"
JOB = Path(__file__).parent / "job.yaml"


@dataclass(frozen=True)
class Options:
    """`model`: a served one, the first unless named. `largest`: of the two numbers; `held_out`: sums never trained."""

    model: str = ""
    steps: int = 30
    prompts: int = 8
    samples: int = 8
    largest: int = 30
    held_out: int = 40
    every: int = 10
    seed: int = 0


def rows(options: Options) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(sums to learn from, held-out sums), which have none in common."""
    numbers = range(1, options.largest + 1)
    pairs = [(a, b) for a in numbers for b in numbers]
    random.Random(options.seed).shuffle(pairs)
    every = [{"prompt": f"Q: What is {a} plus {b}?\nA: ", "answer": str(a + b)} for a, b in pairs]
    return every[options.held_out :], every[: options.held_out]


def files(options: Options) -> dict[str, str]:
    """The job, ready to be sent."""
    learned, held_out = rows(options)
    job = common.job(JOB, options.model, {
        "steps": options.steps, "batch.prompts": options.prompts, "batch.samples": options.samples,
        "evaluate.every": options.every, "seed": options.seed,
    })  # fmt: skip
    return {"job.yaml": job, "train.jsonl": common.lines(learned), "held_out.jsonl": common.lines(held_out)}


def run(options: Options) -> common.Result:
    job = common.train(f"recipe-{NAME}", files(options))
    before, after = (job.evaluation[when]["reward/mean"] for when in ("before", "after"))
    rewards = job.curve("reward/mean")
    table: list[list[common.Cell]] = [
        ["held-out sums right, greedy", before, after],
        ["mean reward of sampled answers", *common.ends(rewards)],
    ]
    figures = common.Table(["", "before", "after"], table)
    return common.Result(NAME, common.model_of(options.model), asdict(options), figures, {"mean reward": rewards})


def said(when: int) -> list[tuple[str, str, str]]:
    """(question, completion, right answer) of the held-out sums after `when` steps of the last run."""
    return [
        (row["prompt"].splitlines()[0], row["completion"], row["answer"])
        for row in common.rollouts(f"recipe-{NAME}", f"evaluation-{when}")
    ]


if __name__ == "__main__":
    common.save(run(common.options(Options, __doc__)))
