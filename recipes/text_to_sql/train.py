"""Text to SQL: a few examples, then reinforcement learning by what queries give on a database."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes import common
from recipes.text_to_sql import questions
from recipes.text_to_sql.questions import Question

HERE = Path(__file__).parent
NAME = "recipe-text-to-sql"


@dataclass(frozen=True)
class Options:
    """`model`: a served one, the first unless named. `shown`: questions with queries; `held_out`: never trained."""

    model: str = ""
    shown: int = 12
    warm_steps: int = 10
    steps: int = 20
    prompts: int = 8
    samples: int = 8
    max_tokens: int = 48
    held_out: int = 40
    every: int = 10
    seed: int = 0


def split(options: Options) -> tuple[list[Question], list[Question], list[Question]]:
    """Questions (with queries to learn from, to try, held out), which have none in common."""
    draw = random.Random(options.seed)
    plain, others = questions.every()
    draw.shuffle(plain)
    rest = plain[options.shown :] + others
    draw.shuffle(rest)
    return plain[: options.shown], rest[options.held_out :], rest[: options.held_out]


def _tried(asked: list[Question]) -> str:
    return common.lines([{"prompt": each.prompt, "answer": each.query} for each in asked])


def warm(options: Options) -> common.Job:
    """Supervised, on the few."""
    shown, _, _ = split(options)
    job = common.job(HERE / "warm.yaml", options.model, {"steps": options.warm_steps, "seed": options.seed})
    rows = common.lines([{"prompt": each.prompt, "completion": f"{each.query}\n"} for each in shown])
    return common.train(f"{NAME}-warm", {"job.yaml": job, "shown.jsonl": rows})


def reinforce(options: Options, begin: str) -> common.Job:
    """From the checkpoint `begin`, by the reward."""
    _, tried, held_out = split(options)
    changes: dict[str, Any] = {
        "steps": options.steps, "batch.prompts": options.prompts, "batch.samples": options.samples,
        "sampling.max_tokens": options.max_tokens, "evaluate.every": options.every, "init_from": begin,
        "seed": options.seed,
    }  # fmt: skip
    return common.train(NAME, {
        "job.yaml": common.job(HERE / "job.yaml", options.model, changes), "train.jsonl": _tried(tried),
        "held_out.jsonl": _tried(held_out), "schema.sql": (HERE / "schema.sql").read_text(encoding="utf-8"),
    })  # fmt: skip


def run(options: Options) -> common.Result:
    begin = warm(options)
    job = reinforce(options, begin.checkpoint)
    before, after = (job.evaluation[when]["reward/mean"] for when in ("before", "after"))
    rewards = job.curve("reward/mean")
    rows: list[list[common.Cell]] = [
        ["held-out questions right, greedy", before, after],
        ["mean reward of sampled queries", *common.ends(rewards)],
    ]
    figures = common.Table(["", "after the examples", "after RL"], rows)
    model = common.model_of(options.model)
    return common.Result("text_to_sql", model, asdict(options), figures, {"mean reward": rewards})


def said(when: int) -> list[tuple[str, str, float]]:
    """(question, query, what it was worth) of the held-out questions after `when` steps of the last run."""
    return [
        (row["prompt"].splitlines()[1].removeprefix("-- "), row["completion"].strip(), row["reward"])
        for row in common.rollouts(NAME, f"evaluation-{when}")
    ]


if __name__ == "__main__":
    common.save(run(common.options(Options, __doc__)))
