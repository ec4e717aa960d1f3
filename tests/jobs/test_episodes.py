"""Jobs of episodes: the step that rl takes on the same rollouts, whatever happens to notifications and processes."""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from knapper.jobs import episodes, spec
from knapper.jobs.names import Start
from knapper.jobs.rows import EpisodeRow
from knapper.jobs.spec import EpisodesJob
from knapper.jobs.yaml_document import JobError
from knapper.state.job_records import Rollouts, Scores, read
from tests.jobs.services import lines
from tests.jobs.test_works import PROMPTS, RL, ended
from tests.jobs.works import House, Malice, Works, run

ONE_STEP = RL.replace("steps: 4", "steps: 1").replace("warmup_steps: 1", "warmup_steps: 0")
ONE_STEP = ONE_STEP.replace("evaluate: {data: e.jsonl, every: 2}\n", "")
EPISODES = """\
kind: episodes
data: d.jsonl
epochs: 1
batch: {episodes: 12}
lora: {rank: 4}
optimizer: {learning_rate: 0.01}
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def by_rl(house: House) -> tuple[bytes, str, list[float]]:
    """(the adapter after one step, the rows of its rollouts, their advantages)"""
    works = Works(house)
    rows: list[dict[str, Any]] = []

    async def story() -> None:
        begun = await works.submit({"job.yaml": ONE_STEP, "p.jsonl": PROMPTS})
        await works.run(begun)
        for part in range(3):
            rows.extend(await _rows(works, begun, part))

    run(story)
    said = [json.loads(line) for line in works.output("rollouts/step-1.jsonl").splitlines()]
    return works.adapter(), lines(*rows), [line["advantage"] for line in said]


async def _rows(works: Works, begun: Start, part: int) -> list[dict[str, Any]]:
    rollouts = await read(works.store, begun.rollouts("steps", 0, part), Rollouts)
    scores = await read(works.store, begun.scores("steps", 0, part), Scores)
    assert rollouts is not None
    assert scores is not None
    rows = []
    for rollout, score in zip(rollouts.rollouts, scores.scores, strict=True):
        tokens = [*rollouts.prompt, *np.frombuffer(rollout.tokens, "<i4").tolist()]
        logprobs = np.frombuffer(rollout.logprobs, "<f4").tolist()
        sequence = {"tokens": tokens, "sampled": [[len(rollouts.prompt), len(tokens)]], "logprobs": logprobs}
        rows.append({"episode": rollout.id, "group": str(part), "reward": score.value, "sequences": [sequence]})
    return rows


def test_the_same_rollouts_take_the_step_that_rl_takes(house: House, by_rl: tuple[bytes, str, list[float]]) -> None:
    adapter, rows, advantages = by_rl
    works = Works(house)
    assert run(lambda: ended(works, {"job.yaml": EPISODES, "d.jsonl": rows})) == "completed: "
    said = [json.loads(line) for line in works.output("rollouts/step-1.jsonl").splitlines()]
    order = [json.loads(row)["episode"] for row in rows.splitlines()]
    assert [line["advantage"] for line in sorted(said, key=lambda line: order.index(line["id"]))] == advantages
    expected, found = load(adapter), load(works.adapter())
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():  # Adam's first step is the gradient's sign: rounding may turn one near zero
        differing = np.abs(tensor - found[name]) > 1e-4
        assert differing.mean() < 0.01, name
    assert any(np.abs(tensor).max() > 0 for name, tensor in found.items() if "lora_B" in name)


def test_whatever_happens_the_adapter_is_the_same_bit_for_bit(
    house: House, by_rl: tuple[bytes, str, list[float]]
) -> None:
    yaml = EPISODES.replace("epochs: 1", "epochs: 2").replace("episodes: 12", "episodes: 5")
    files = {"job.yaml": yaml, "d.jsonl": by_rl[1]}
    calm, wild = Works(house), Works(house, 1, Malice(lose=0.2, copies_max=5, shuffle=True, kill=0.1), slice_s=0.02)
    for works in (calm, wild):
        assert run(lambda works=works: ended(works, files)) == "completed: "  # type: ignore[misc]  # of a default
    assert len(calm.output("metrics.jsonl").splitlines()) == 5  # 24 episodes, 5 a step
    assert wild.adapter() == calm.adapter()
    assert wild.output("rollouts/step-5.jsonl") == calm.output("rollouts/step-5.jsonl")


@pytest.mark.parametrize(
    ("yaml", "rewards", "says"),
    [
        (EPISODES + "max_tokens: 2\n", (0, 1), "row 1 of d.jsonl: a sequence has 3 tokens; allowed: 2"),
        (EPISODES, (1, 1), "within each group all episodes have the same reward"),
    ],
)
def test_what_cannot_be_learned_ends_the_job_and_is_told(
    house: House, yaml: str, rewards: tuple[int, int], says: str
) -> None:
    sequence = {"tokens": [5, 6, 7], "sampled": [[1, 3]], "logprobs": [-0.5, -1.5]}
    rows = lines(*({"reward": reward, "sequences": [sequence]} for reward in rewards))
    told = run(lambda: ended(Works(house), {"job.yaml": yaml, "d.jsonl": rows}))
    assert told.startswith("failed: ")
    assert says in told


@pytest.mark.parametrize("loss", ["ppo", "gspo"])
def test_another_loss_trains_and_one_that_teaches_nothing_is_passed_over(house: House, loss: str) -> None:
    given = f"loss: {{name: {loss}, clip_low_threshold: 0.8, clip_high_threshold: 1.2}}\n"
    sequence = {"tokens": [5, 6, 7], "sampled": [[1, 3]], "logprobs": [-0.5, -1.5]}
    rows = lines(*({"group": "ab"[n // 2], "reward": (0, 1, 1, 1)[n], "sequences": [sequence]} for n in range(4)))
    works = Works(house)
    assert run(lambda: ended(works, {"job.yaml": EPISODES + given, "d.jsonl": rows})) == "completed: "
    (metrics,) = map(json.loads, works.output("metrics.jsonl").splitlines())
    assert (metrics["rows/silent"], metrics["reward/mean"]) == (2, 0.75)
    assert "loss/mean" in metrics


def test_advantages_are_those_of_a_group_wherever_its_rows_stand() -> None:
    job = spec.parse((EPISODES + "advantage: group_centred\n").encode()).job
    assert isinstance(job, EpisodesJob)
    rows = [
        EpisodeRow("", group, reward, [])
        for group, reward in (("a", 1.0), ("", 4.0), ("a", 3.0), ("", 8.0), ("c", 5.0))
    ]
    assert episodes.advantages_of(job, rows) == [-1.0, -2.0, 1.0, 2.0, 0.0]


def test_what_is_held_out_and_what_is_best_are_no_fields_of_it() -> None:
    for more in (
        "evaluate: {data: e.jsonl, every: 1}\n",
        "keep: best\n",
        "stop_early: {}\n",
        "reward: {name: length}\n",
    ):
        with pytest.raises(JobError, match=more.partition(":")[0]):
            spec.parse((EPISODES + more).encode())
