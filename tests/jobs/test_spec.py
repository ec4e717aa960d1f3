"""job.yaml: what is right is read, what is wrong is named with its line."""

from typing import get_args

import pytest

from knapper import limits
from knapper.engine.training.losses import LOSSES
from knapper.jobs import schedule, spec
from knapper.jobs.spec import DpoJob, LossName, Optimizer, RlJob, SftJob
from knapper.jobs.yaml_document import JobError

DESIGN = b"""\
kind: rl                      # or sft, dpo, episodes
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
lora: {rank: 16, seed: 0}
data: prompts.jsonl
steps: 50
batch: {prompts: 8, samples: 8}
sampling: {max_tokens: 64, temperature: 1.0}
loss: {name: importance_sampling}
advantage: group_normalised
optimizer: {learning_rate: 1.0e-4, schedule: linear, warmup_steps: 5, grad_clip_norm: 1.0}
reward: {name: exact_match}
evaluate: {data: held_out.jsonl, every: 10}
max_staleness: 1
"""


def test_the_example_of_the_documentation_is_a_job() -> None:
    job = spec.parse(DESIGN).job
    assert isinstance(job, RlJob)
    assert (
        job.lora.rank,
        job.batch.samples,
        job.optimizer.learning_rate,
        job.max_staleness,
    ) == (16, 8, 1e-4, 1)
    assert job.files == ["prompts.jsonl", "held_out.jsonl"]
    assert spec.decode(spec.encode(job)) == job


def test_what_a_reward_needs_is_among_the_files() -> None:
    job = spec.parse(DESIGN.replace(b"{name: exact_match}", b"[{code: reward.py}, {name: length, max: 9}]")).job
    assert job.files == ["prompts.jsonl", "held_out.jsonl", "reward.py"]


def test_other_kinds() -> None:
    sft = spec.parse(b"kind: sft\ndata: a.jsonl\nepochs: 2\nloss_on: [assistant]\npacking: true\n").job
    assert isinstance(sft, SftJob)
    assert sft.loss_on == ["assistant"]
    dpo = spec.parse(b"kind: dpo\ndata: a.jsonl\nsteps: 2\noptimizer: {learning_rate: 5e-6}\n").job
    assert isinstance(dpo, DpoJob)
    assert dpo.optimizer.learning_rate == 5e-6  # PyYAML itself reads a text


@pytest.mark.parametrize(
    ("wrong", "line", "field", "says"),
    [
        (b"", 1, "its content", "a job"),
        (b"- a\n", 1, "its content", "a job"),
        (b"kind: rlhf\n", 1, "kind", "rl, sft, dpo, episodes"),
        (b"data: x\n", 1, "kind", "None"),
        (b"kind: rl\nsteps: 5\nsteps: 6\n", 3, "steps", "second time"),
        (b"kind: [\n", 2, "its syntax", "YAML"),
        (b"kind: rl\ndata: \xff\n", 2, "its encoding", "UTF-8"),
        (b"kind: rl\ndata: &a x\nlora: *a\n", 2, "an anchor", "plain values"),
        (b"kind: rl\ndata: !!python/name:os.system x\n", 2, "data", "plain values"),
        (b"kind: rl\n? [a]\n: b\n", 2, "a field", "a name"),
        (DESIGN.replace(b"rank: 16", b"rank: 0"), 3, "lora.rank", "is 0"),
        (DESIGN.replace(b"rank: 16", b"rank: 257"), 3, "lora.rank", "257"),
        (DESIGN.replace(b"rank:", b"rnak:"), 3, "lora.rnak", "rank, alpha"),
        (DESIGN + b"extra: 1\n", 14, "extra", "max_staleness"),
        (
            DESIGN.replace(b"prompts.jsonl", b"../prompts.jsonl"),
            4,
            "data",
            "../prompts",
        ),
        (DESIGN.replace(b"steps: 50", b"steps: fifty"), 5, "steps", "fifty"),
        (DESIGN.replace(b"steps: 50\n", b""), 1, "steps", "required"),
        (DESIGN.replace(b"1.0e-4", b".nan"), 10, "optimizer.learning_rate", ""),
        (DESIGN.replace(b"linear", b"square"), 10, "optimizer.schedule", "square"),
        (DESIGN.replace(b"warmup_steps: 5", b"warmup_steps: 51"), 10, "optimizer.warmup_steps", "0 to 50"),
        (DESIGN.replace(b"warmup_steps: 5", b"warmup_ratio: 1.0"), 10, "optimizer.warmup_ratio", "1.0"),
        (DESIGN.replace(b"warmup_steps", b"warmup_ratio: 0.1, warmup_steps"), 10, "optimizer.warmup_ratio", "one of"),
        (DESIGN.replace(b"importance_sampling", b"dro"), 8, "loss.name", "dro"),
        (
            DESIGN.replace(b"importance_sampling", b"gspo"),
            8,
            "loss.clip_low_threshold",
            "gspo",
        ),
        (DESIGN.replace(b"exact_match", b"exact"), 11, "reward.name", "exact_match"),
        (DESIGN.replace(b"staleness: 1", b"staleness: 5"), 13, "max_staleness", "5"),
        (b"kind: sft\ndata: a\n", 1, "steps", "epochs"),
        (b"kind: sft\ndata: a\nsteps: 1\nepochs: 1\n", 3, "steps", "both"),
        (
            b"kind: sft\nsteps: 1\ndata: a\nreward: {name: length, max: 1}\n",
            4,
            "reward",
            "no field of this name",
        ),
        (b"#" * (limits.job_yaml_bytes_max + 1), 1, "its size in bytes", "at most"),
        (b"kind: rl\na: " + b"[" * 1000 + b"]" * 1000, 2, "its depth", "levels"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(wrong: bytes, line: int, field: str, says: str) -> None:
    with pytest.raises(JobError) as caught:
        spec.parse(wrong)
    assert (caught.value.line, says in str(caught.value)) == (line, True), str(caught.value)
    assert (caught.value.field or "").startswith(field), caught.value.field
    assert caught.value.report()["line"] == line


def test_the_largest_job_yaml_that_is_allowed_is_read() -> None:
    padded = DESIGN + b"#" * (limits.job_yaml_bytes_max - len(DESIGN))
    assert spec.parse(padded).job == spec.parse(DESIGN).job


def test_learning_rates_go_up_and_then_as_the_schedule_says() -> None:
    def rates(name: str, **more: float) -> list[float]:
        optimizer = Optimizer(learning_rate=1.0, schedule=name, warmup_steps=2, **more)  # type: ignore[arg-type]
        return [round(schedule.adamw(optimizer, step, 6).learning_rate, 3) for step in range(6)]

    assert rates("constant") == [0.333, 0.667, 1, 1, 1, 1]
    assert rates("linear") == [0.333, 0.667, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == [0.333, 0.667, 1, 0.854, 0.5, 0.146]
    assert rates("linear", final=0.5) == [0.333, 0.667, 1, 0.875, 0.75, 0.625]


@pytest.mark.parametrize(
    ("ratio", "steps", "warm"), [(0.0, 100, 0), (0.07, 100, 7), (0.1, 30, 3), (0.1, 31, 4), (0.99, 1, 1)]
)
def test_a_warmup_may_be_a_part_of_all_steps(ratio: float, steps: int, warm: int) -> None:
    optimizer = Optimizer(learning_rate=1.0, schedule="constant", warmup_ratio=ratio)
    plain = Optimizer(learning_rate=1.0, schedule="constant", warmup_steps=warm)
    assert schedule.warmup_steps(optimizer, steps) == warm
    for step in range(steps):
        assert schedule.adamw(optimizer, step, steps) == schedule.adamw(plain, step, steps)


def test_the_longest_warmup_that_a_job_may_have() -> None:
    job = spec.parse(DESIGN.replace(b"warmup_steps: 5", b"warmup_steps: 50")).job
    assert job.optimizer.warmup_steps == 50


def test_an_epoch_has_every_row_once_and_batches_go_on_over_its_end() -> None:
    taken = [row for step in range(5) for row in schedule.rows(7, step, 4, 10)]
    assert sorted(taken[:10]) == sorted(taken[10:20]) == list(range(10))
    assert taken[:10] != taken[10:20]
    assert taken != [row for step in range(5) for row in schedule.rows(8, step, 4, 10)]


def test_jobs_take_every_loss_that_learns_from_samples() -> None:
    """One table of losses: the engine's. dro alone is left out, whose sum goes over the prompt's tokens too."""
    sampled = {name for name, loss in LOSSES.items() if {"logprobs", "advantages"} <= set(loss.required)}
    assert set(get_args(LossName.__annotations__["name"])) == sampled - {"dro"}
