"""Preference tuning: short answers first as examples, then by DPO as preferred to those that the model gives."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from recipes import common

HERE = Path(__file__).parent
NAME = "preference"
JOB = f"recipe-{NAME}"


@dataclass(frozen=True)
class Options:
    """`model`: a served one, the first unless named. `held_out`: questions that are never trained."""

    model: str = ""
    max_tokens: int = 48
    questions: int = 40
    held_out: int = 10
    warm_steps: int = 4
    steps: int = 8
    pairs: int = 8
    seed: int = 0


class Preferred(NamedTuple):
    question: str
    answer: str


class Answer(NamedTuple):
    """`ended`: by itself, before the limit of tokens."""

    text: str
    ended: bool


def split(options: Options) -> tuple[list[Preferred], list[Preferred]]:
    """(questions to learn from, held-out questions), each with the short answer that is preferred."""
    lines = (HERE / "pairs.txt").read_text(encoding="utf-8").splitlines()
    every = [Preferred(*line.split("|")) for line in lines]
    random.Random(options.seed).shuffle(every)
    every = every[: options.questions]
    return every[options.held_out :], every[: options.held_out]


def ask(model: str, questions: Sequence[Preferred], options: Options) -> list[Answer]:
    """Several at a time: the engine draws them together, and each answer is what it would be alone."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda each: Answer(*common.chat(model, each.question, options.max_tokens)), questions))


def pairs(preferred: Sequence[Preferred], own: Sequence[Answer]) -> str:
    """Rows of a DPO job; the model's own chat template writes them."""
    return common.lines([
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"role": "assistant", "content": rejected.text or "-"}],
        }
        for (question, answer), rejected in zip(preferred, own, strict=True)
    ])  # fmt: skip


def words(answers: Sequence[Answer]) -> float:
    return sum(len(each.text.split()) for each in answers) / len(answers)


def ended(answers: Sequence[Answer]) -> float:
    return sum(each.ended for each in answers) / len(answers)


def warm(options: Options, learned: Sequence[Preferred]) -> common.Job:
    """Supervised, on the short answers."""
    job = common.job(HERE / "warm.yaml", options.model, {"steps": options.warm_steps, "seed": options.seed})
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in learned
    ]
    return common.train(f"{JOB}-warm", {"job.yaml": job, "shown.jsonl": common.lines(rows)})


def prefer(options: Options, begin: str, learned: str, held_out: str) -> common.Job:
    """By DPO, from the checkpoint `begin`."""
    changes = {"steps": options.steps, "batch.pairs": options.pairs, "init_from": begin, "seed": options.seed}
    yaml = common.job(HERE / "job.yaml", options.model, changes)
    return common.train(JOB, {"job.yaml": yaml, "pairs.jsonl": learned, "held_out.jsonl": held_out})


def run(options: Options) -> tuple[common.Result, list[tuple[str, str, str, str]]]:
    """The figures, and (question, answer before, after the examples, after DPO) of the held-out questions."""
    learned, held_out = split(options)
    model = common.model_of(options.model)
    own, before = ask(model, learned, options), ask(model, held_out, options)
    begin = warm(options, learned)
    between = ask(begin.name, held_out, options)
    job = prefer(options, begin.checkpoint, pairs(learned, own), pairs(held_out, before))
    after = ask(JOB, held_out, options)
    was, became = job.evaluation["before"], job.evaluation["after"]
    stages = (before, between, after)
    rows: list[list[common.Cell]] = [
        ["words of a held-out answer", *(words(each) for each in stages)],
        [f"held-out answers that end within {options.max_tokens} tokens", *(ended(each) for each in stages)],
        ["margin of the short answer in held-out pairs", "", was["margin/mean"], became["margin/mean"]],
        ["held-out DPO loss", "", was["loss/mean"], became["loss/mean"]],
    ]
    figures = common.Table(["", "before", "after the examples", "after DPO"], rows)
    result = common.Result(NAME, model, asdict(options), figures, {"DPO loss": job.curve("loss/mean")})
    asked = [each.question for each in held_out]
    return result, list(zip(asked, *([each.text for each in stage] for stage in stages), strict=True))


if __name__ == "__main__":
    done, said = run(common.options(Options, __doc__))
    for question, *answers in said:
        print(question, *(f"  {answer[:100]!r}" for answer in answers), sep="\n")
    common.save(done)
