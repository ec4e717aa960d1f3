"""On-policy distillation: a student answers, and a teacher says of each of its tokens how likely it would have been.

The teacher is another served model, by `--teacher`, or an adapter of the same model that learned sums first.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tinker
from tinker import types

from recipes import common
from recipes.arithmetic import train as arithmetic

MAX_TOKENS = 4


@dataclass(frozen=True)
class Options:
    """`model`: a served one, the first unless named. `teacher`: a larger one with the same tokenizer."""

    model: str = ""
    teacher: str = ""
    teacher_steps: int = 30
    steps: int = 30
    prompts: int = 16
    samples: int = 4
    largest: int = 9
    held_out: int = 20
    rank: int = 16
    learning_rate: float = 4e-4
    seed: int = 0


def new(service: tinker.ServiceClient, model: str, options: Options) -> tinker.TrainingClient:
    return service.create_lora_training_client(
        model, rank=options.rank, seed=options.seed, train_unembed=False
    ).result()


def teacher_of(service: tinker.ServiceClient, model: str, options: Options) -> tinker.SamplingClient:
    """Who scores the student's tokens."""
    if options.teacher:
        return service.create_sampling_client(base_model=common.model_of(options.teacher)).result()
    taught = new(service, model, options)
    sums, _ = split(options)
    draw, tokenizer = random.Random(options.seed + 1), taught.get_tokenizer()
    for step in range(options.teacher_steps):
        chosen = draw.sample(sums, min(options.prompts, len(sums)))
        data = [common.example(tokenizer, each["prompt"], f"{each['answer']}\n") for each in chosen]
        taught.forward_backward(data, "cross_entropy")
        taught.optim_step(types.AdamParams(learning_rate=1e-3 * (1 - step / options.teacher_steps))).result()
    return taught.save_weights_and_get_sampling_client().result()


def split(options: Options) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(sums to learn from, held-out sums)."""
    every = arithmetic.Options(largest=options.largest, held_out=options.held_out, seed=options.seed)
    return arithmetic.rows(every)


def datum(prompt: list[int], sampled: Sequence[int], own: list[float], teacher: list[float]) -> types.Datum:
    """The advantage of a token is how much likelier the teacher finds it: minus the reverse KL, token by token."""
    before = len(prompt) - 1
    return types.Datum(
        model_input=types.ModelInput.from_ints([*prompt, *sampled][:-1]),
        loss_fn_inputs={
            "target_tokens": [*prompt, *sampled][1:],
            "logprobs": [0.0] * before + own,
            "advantages": [0.0] * before + [theirs - ours for theirs, ours in zip(teacher, own, strict=True)],
        },
    )


def rollouts(
    student: tinker.TrainingClient, teacher: tinker.SamplingClient, asked: list[str], options: Options, seed: int
) -> tuple[list[types.Datum], float]:
    """(data of one step, mean over its tokens of log student - log teacher)."""
    tokenizer, sampler = student.get_tokenizer(), student.save_weights_and_get_sampling_client().result()
    prompts = [tokenizer.encode(prompt) for prompt in asked]
    params = types.SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, stop=["\n"], seed=seed)
    futures = [
        sampler.sample(types.ModelInput.from_ints(each), num_samples=options.samples, sampling_params=params)
        for each in prompts
    ]
    sampled = [
        (prompt, sequence)
        for prompt, future in zip(prompts, futures, strict=True)
        for sequence in future.result().sequences
    ]
    scored = [
        teacher.compute_logprobs(types.ModelInput.from_ints([*prompt, *sequence.tokens]))
        for prompt, sequence in sampled
    ]
    data, apart, tokens = list[types.Datum](), 0.0, 0
    for (prompt, sequence), future in zip(sampled, scored, strict=True):
        assert sequence.logprobs is not None
        own, theirs = list(sequence.logprobs), [float(each or 0.0) for each in future.result()[len(prompt) :]]
        data.append(datum(prompt, sequence.tokens, own, theirs))
        apart, tokens = apart + sum(own) - sum(theirs), tokens + len(own)
    return data, apart / tokens


def loop(student: tinker.TrainingClient, teacher: tinker.SamplingClient, options: Options) -> list[float]:
    """How far the student's tokens are from the teacher, per token, at each step."""
    sums, _ = split(options)
    draw = random.Random(options.seed + 2)
    distances: list[float] = []
    for step in range(options.steps):
        asked = [each["prompt"] for each in draw.sample(sums, min(options.prompts, len(sums)))]
        data, apart = rollouts(student, teacher, asked, options, 1000 * step)
        passed = student.forward_backward(data, "importance_sampling")
        stepped = student.optim_step(types.AdamParams(learning_rate=options.learning_rate * (1 - step / options.steps)))
        passed.result()
        stepped.result()
        distances.append(apart)
        if step % 5 == 4:
            print(f"step {step + 1:3}/{options.steps}  log student - log teacher {apart:.3f}", flush=True)
    return distances


def right(sampler: tinker.SamplingClient, tokenizer: Any, sums: list[dict[str, Any]]) -> tuple[list[str], float]:
    """(what it says to each, greedy, and how many of them are right, as a share)."""
    said = common.answers(sampler, tokenizer, [each["prompt"] for each in sums], MAX_TOKENS)
    return said, sum(answer == each["answer"] for answer, each in zip(said, sums, strict=True)) / len(sums)


def run(options: Options) -> tuple[common.Result, list[tuple[str, str, str]]]:
    """The figures, and (sum, answer before, answer after) of the held-out sums."""
    _, sums = split(options)
    with common.service() as service:
        model = common.model_of(options.model)
        teacher = teacher_of(service, model, options)
        student = new(service, model, options)
        tokenizer = student.get_tokenizer()
        before, was = right(student.save_weights_and_get_sampling_client().result(), tokenizer, sums)
        distances = loop(student, teacher, options)
        after, became = right(student.save_weights_and_get_sampling_client().result(), tokenizer, sums)
        _, best = right(teacher, tokenizer, sums)
    rows: list[list[common.Cell]] = [
        ["held-out sums right, greedy", was, became, best],
        ["log student - log teacher, per token", *common.ends(distances), 0.0],
    ]
    figures = common.Table(["", "before", "after", "teacher"], rows)
    curves = {"log student - log teacher": distances}
    result = common.Result("distillation", model, asdict(options), figures, curves)
    asked = [each["prompt"].splitlines()[0] for each in sums]
    return result, list(zip(asked, before, after, strict=True))


if __name__ == "__main__":
    done, said = run(common.options(Options, __doc__))
    for question, before, after in said[:10]:
        print(f"  {question:24} {before!r:12} {after!r}")
    common.save(done)
