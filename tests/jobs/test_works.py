"""Whole jobs, from the upload to the adapter, by bells alone."""

import json

import pytest

from knapper.jobs import control
from tests.jobs.places import lines
from tests.jobs.works import House, Malice, Works, run

RL = """\
kind: rl
data: p.jsonl
steps: 4
batch: {prompts: 3, samples: 4}
sampling: {max_tokens: 6}
lora: {rank: 4}
optimizer: {learning_rate: 0.01, warmup_steps: 1}
reward: {name: length, max: 4, slope: 10}
evaluate: {data: e.jsonl, every: 2}
"""
PROMPTS = lines(*({"prompt": f"the {word} and", "answer": word} for word in ("in", "on", "her", "an", "thin")))
HELD_OUT = lines({"prompt": "and the"}, {"prompt": "in a", "answer": 1})
SFT = """\
kind: sft
data: p.jsonl
epochs: 2
batch: {sequences: 2}
lora: {rank: 4}
optimizer: {learning_rate: 0.01}
evaluate: {data: e.jsonl, every: 2}
"""
CHATS = lines(
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the end"}]},
    {"prompt": "and the", "completion": " answer"},
    {"prompt": [{"role": "user", "content": "why?"}], "completion": "on and on"},
    {"messages": [{"role": "system", "content": "be"}, {"role": "assistant", "content": "in the an"}]},
    {"prompt": "a", "completion": " thin line"},
)
DPO = """\
kind: dpo
data: p.jsonl
epochs: 2
batch: {pairs: 2}
beta: 0.5
lora: {rank: 4}
optimizer: {learning_rate: 0.01}
evaluate: {data: e.jsonl}
"""
PAIRS = lines(*({"prompt": f"{n} and", "chosen": " the one", "rejected": f" {n}er"} for n in "abcde"))
JOBS = {
    "rl": {"job.yaml": RL, "p.jsonl": PROMPTS, "e.jsonl": HELD_OUT},
    "rl-ahead": {"job.yaml": RL + "max_staleness: 1\n", "p.jsonl": PROMPTS, "e.jsonl": HELD_OUT},
    "sft": {"job.yaml": SFT, "p.jsonl": CHATS, "e.jsonl": CHATS},
    "dpo": {"job.yaml": DPO, "p.jsonl": PAIRS, "e.jsonl": PAIRS},
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("tiny"))


async def done(works: Works, name: str) -> Works:
    begun = await works.submit(JOBS[name])
    await works.run(begun)
    assert (await control.now(works.store, begun)).state == "completed", await control.now(works.store, begun)
    await works.drain()
    return works


@pytest.mark.parametrize("name", JOBS)
def test_an_upload_ends_with_an_adapter_and_its_curve(house: House, name: str) -> None:
    works = run(lambda: done(Works(house), name))
    files = {path.removeprefix("jobs/local/j/") for path in works.folder.files if path.startswith("jobs/")}
    assert {"adapter/adapter_config.json", "metrics.jsonl", "evaluation.json", "bill.json", "status.json"} <= files
    metrics = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
    steps = len(metrics)
    assert [each["step"] for each in metrics] == list(range(1, steps + 1))
    assert all(("reward/mean" if name.startswith("rl") else "loss/mean") in each for each in metrics)
    evaluation = json.loads(works.output("evaluation.json"))
    assert evaluation["before"]
    assert evaluation["after"]
    bill = json.loads(works.output("bill.json"))
    assert bill["tokens"]["trained"] > 0
    assert json.loads(works.output("status.json"))["state"] == "completed"
    assert run(lambda: works.store.list("working/")) == []
    if name.startswith("rl"):
        assert {f"rollouts/step-{step}.jsonl" for step in range(1, 5)} <= files
        assert [each["step"] for each in evaluation["during"]] == [2]
    else:
        assert evaluation["after"]["loss/mean"] < evaluation["before"]["loss/mean"]


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_to_bells_and_processes_the_adapter_is_the_same_bit_for_bit(
    house: House, name: str, seed: int
) -> None:
    calm = run(lambda: done(Works(house), name))
    malice = Malice(lose=0.2, copies_max=5, shuffle=True, kill=0.1)
    wild = run(lambda: done(Works(house, seed, malice, slice_s=0.02), name))
    assert wild.adapter() == calm.adapter()
    for file in ("rollouts/step-4.jsonl", "evaluation.json"):
        if name.startswith("rl") or file == "evaluation.json":
            assert wild.output(file) == calm.output(file)


def test_duplicates_do_not_multiply(house: House) -> None:
    works = run(lambda: done(Works(house, 1, Malice(copies_max=5, shuffle=True)), "rl"))
    assert len(works.log) < 60
