"""Tool use: a model learns to call a calculator and to answer with its result, in rollouts of several turns."""

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recipes import common

HERE = Path(__file__).parent
NAME = "tool_use"
JOB = "recipe-tool-use"


@dataclass(frozen=True)
class Options:
    """`model`: a served one, the first unless named. `shown`: products with their calls; `held_out`: never trained."""

    model: str = ""
    shown: int = 4
    warm_steps: int = 4
    steps: int = 12
    prompts: int = 8
    samples: int = 8
    tried: int = 200
    held_out: int = 40
    every: int = 4
    seed: int = 0


class Product(NamedTuple):
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"Q: What is {self.a} times {self.b}?\n"

    @property
    def call(self) -> str:
        return f"CALC {self.a}*{self.b}\n"

    @property
    def answer(self) -> str:
        return str(self.a * self.b)


def split(options: Options) -> tuple[list[Product], list[Product], list[Product]]:
    """Products (shown, to try, held out), which have none in common."""
    drawn = [Product(a, b) for a in range(11, 100) for b in range(11, 100)]
    random.Random(options.seed).shuffle(drawn)
    first, last = options.shown + options.held_out, options.shown + options.held_out + options.tried
    return drawn[: options.shown], drawn[first:last], drawn[options.shown : first]


def demonstrations(products: list[Product]) -> list[dict[str, str]]:
    """Two rows each: the call after the question, and the answer after the result."""
    rows = []
    for each in products:
        rows.append({"prompt": each.prompt, "completion": each.call})
        rows.append({
            "prompt": f"{each.prompt}{each.call}RESULT {each.answer}\nA:", "completion": f" {each.answer}\n",
        })  # fmt: skip
    return rows


def warm(options: Options) -> common.Job:
    """Supervised, on the few."""
    shown, _, _ = split(options)
    job = common.job(HERE / "warm.yaml", options.model, {"steps": options.warm_steps, "seed": options.seed})
    return common.train(f"{JOB}-warm", {"job.yaml": job, "shown.jsonl": common.lines(demonstrations(shown))})


def reinforce(options: Options, begin: str) -> common.Job:
    """From the checkpoint `begin`, with the environment."""
    _, tried, held_out = split(options)
    changes: dict[str, Any] = {
        "steps": options.steps, "batch.prompts": options.prompts, "batch.samples": options.samples,
        "evaluate.every": options.every, "init_from": begin, "seed": options.seed,
    }  # fmt: skip
    rows = [
        common.lines([{"prompt": each.prompt, "answer": each.answer} for each in part]) for part in (tried, held_out)
    ]
    return common.train(JOB, {
        "job.yaml": common.job(HERE / "job.yaml", options.model, changes), "train.jsonl": rows[0],
        "held_out.jsonl": rows[1], "env.py": (HERE / "env.py").read_text(encoding="utf-8"),
    })  # fmt: skip


def run(options: Options) -> common.Result:
    job = reinforce(options, warm(options).checkpoint)
    before, after = (job.evaluation[when]["reward/mean"] for when in ("before", "after"))
    rewards = job.curve("reward/mean")
    rows: list[list[common.Cell]] = [
        ["held-out products right, sampled", before, after],
        ["mean reward of sampled episodes", *common.ends(rewards)],
    ]
    figures = common.Table(["", "after the examples", "after RL"], rows)
    return common.Result(NAME, common.model_of(options.model), asdict(options), figures, {"mean reward": rewards})


def said(when: int) -> list[tuple[str, float]]:
    """(question and turns, what the episode was worth) of the held-out products after `when` steps of the last run."""
    return [
        (" | ".join([row["prompt"].strip(), *(turn["completion"].strip() for turn in row["turns"])]), row["reward"])
        for row in common.rollouts(JOB, f"evaluation-{when}")
    ]


if __name__ == "__main__":
    common.save(run(common.options(Options, __doc__)))
