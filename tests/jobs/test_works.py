"""Whole jobs, from the upload to the adapter, by bells alone."""

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from knapper.errors import InvalidField
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs import control, progress, revive, run_client
from knapper.jobs.activity import Function
from knapper.jobs.names import Start
from knapper.jobs.revive import Seen
from knapper.rewards import scorer
from knapper.rewards.rollouts import ScorableRollout
from knapper.rewards.scorer import RewardScore
from knapper.rewards.spec import Reward
from knapper.state.alarms import Alarms
from knapper.state.journal import history
from knapper.state.journal.records import Alarm, Operation
from tests.jobs.services import lines
from tests.jobs.works import TERMS, House, Malice, Works, run, variety

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
optimizer: {learning_rate: 0.01, schedule: cosine, warmup_ratio: 0.3, final: 0.1}
evaluate: {data: e.jsonl, every: 2}
"""
CHATS = lines(
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "the end"},
        ]
    },
    {"prompt": "and the", "completion": " answer"},
    {"prompt": [{"role": "user", "content": "why?"}], "completion": "on and on"},
    {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "assistant", "content": "in the an"},
        ]
    },
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
    "rl-ahead": {
        "job.yaml": RL + "max_staleness: 1\n",
        "p.jsonl": PROMPTS,
        "e.jsonl": HELD_OUT,
    },
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
    assert {
        "adapter/adapter_config.json",
        "metrics.jsonl",
        "evaluation.json",
        "bill.json",
        "status.json",
    } <= files
    metrics = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
    steps = len(metrics)
    assert [each["step"] for each in metrics] == list(range(1, steps + 1))
    assert all(("reward/mean" if name.startswith("rl") else "loss/mean") in each for each in metrics)
    evaluation = json.loads(works.output("evaluation.json"))
    assert evaluation["before"]
    assert evaluation["after"]
    assert all("grad_norm" in each for each in metrics), "every step trains"
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


class Quick(Works):
    """A Broker that has delivered an event before it answers the one who posted it."""

    async def post(self, event: Event) -> None:
        await super().post(event)
        await self.drain()


@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_a_slice_that_is_over_goes_on_however_soon_its_doorbell_comes(house: House, name: str) -> None:
    """Nobody has to revive the job."""

    async def story() -> Works:
        works = Quick(house, slice_s=0.2)
        begun = await works.submit(JOBS[name])
        assert (await control.now(works.store, begun)).state == "completed"
        return works

    works = run(story)
    assert len([event for event in works.log if event.type == cloudevents.JOB_STARTED]) > 1, "it had several slices"
    assert works.adapter() == run(lambda: done(Works(house), name)).adapter()


def test_duplicates_do_not_multiply(house: House) -> None:
    works = run(lambda: done(Works(house, 1, Malice(copies_max=5, shuffle=True)), "rl"))
    rung = Counter((event.type, event.step) for event in works.log)
    assert max(rung.values()) <= 2, "a step and an evaluation may have the same number"


def test_which_version_a_step_is_sampled_from_depends_on_its_number_alone(
    house: House,
) -> None:
    works = run(lambda: done(Works(house), "rl-ahead"))
    metrics = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
    assert [each["staleness"] for each in metrics] == [0, 1, 1, 1]
    first_two = [json.loads(line)["id"] for line in works.output("rollouts/step-2.jsonl").splitlines()]
    assert first_two[0] == "2/0/0"
    sampled = [event.step for event in works.log if event.type == cloudevents.ROLLOUTS_SAMPLED]
    stepped = [event.step for event in works.log if event.type == cloudevents.ADAPTER_STEPPED]
    assert sampled.index(1) < len(sampled)
    first_step = works.log.index(next(event for event in works.log if event.type == cloudevents.ADAPTER_STEPPED))
    ahead = next(
        n for n, event in enumerate(works.log) if event.type == cloudevents.ROLLOUTS_SAMPLED and event.step == 1
    )
    assert ahead < first_step, "step 2's rollouts were sampled before step 1 was trained"
    assert stepped == [1, 2, 3, 4]
    assert works.adapter() != run(lambda: done(Works(house), "rl")).adapter()


@pytest.mark.parametrize("name", JOBS)
def test_a_cancelled_job_stops_within_one_operation_and_goes_on_to_the_same_adapter(house: House, name: str) -> None:
    calm = run(lambda: done(Works(house), name))

    async def story() -> Works:
        works = Works(house, slice_s=0.05)
        begun = await works.submit(JOBS[name])
        while not await works.store.get(begun.trained(0)):
            await works.deliver()
        await control.ask(works.store, begun, "cancelled", "enough", works.clock())
        before = len(await works.store.list("runs/"))
        await works.drain()
        after = [each for each in await works.store.list("runs/") if "/in/" in each]
        assert len(await works.store.list("runs/")) == before, after
        assert json.loads(works.output("status.json"))["state"] == "cancelled"
        assert await works.store.list("working/") == []
        await control.ask(works.store, begun, "running", "", works.clock())
        await works.store.put_if_absent(begun.working, b"")
        await works.run(begun)
        return works

    assert run(story).adapter() == calm.adapter()


@pytest.mark.parametrize("name", ["rl", "sft"])
def test_a_job_whose_run_has_another_dtype_waits_says_why_and_goes_on_to_the_same_adapter(
    house: House, name: str
) -> None:
    calm = run(lambda: done(Works(house), name))

    async def story() -> Works:
        works = Works(house, slice_s=0.05)
        begun = await works.submit(JOBS[name])
        while not await works.store.get(begun.trained(0)):
            await works.deliver()
        trained = await progress.newest_step(works.store, begun)
        works.restart(msgspec.structs.replace(TERMS, dtype="bfloat16"))
        for _ in range(8):
            for event in await revive.due(works.services, Seen(), quiet_s=0):
                await works.post(event)
            await works.drain_once()
        status = json.loads(works.output("status.json"))
        assert (status["state"], status["step"]) == ("running", trained)
        assert status["reason"].startswith(
            f"waits: {begun.run} was made in float32, and this engine computes in bfloat16"
        )
        assert "KNAPPER_DTYPE=float32" in status["reason"]
        assert len(await works.store.list(begun.controls)) == 1, "it is said once"
        works.restart(TERMS)
        await works.run(begun)
        await works.drain()
        assert json.loads(works.output("status.json"))["reason"] == ""
        return works

    assert run(story).adapter() == calm.adapter()


def test_cancelled_between_the_operations_of_a_step(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operation under way is the last one that is accepted."""
    monkeypatch.setattr(run_client, "_TOKENS_MAX", 8)

    async def story() -> None:
        works = Works(house)
        begun = await works.submit(JOBS["rl"])
        accepted: list[str] = []
        put = works.store.put_if_absent

        async def put_and_cancel(name: str, data: bytes) -> bool:
            if "/in/" in name:
                accepted.append(name)
                if len(accepted) == 3:
                    await control.ask(works.store, begun, "cancelled", "enough", works.clock())
            return await put(name, data)

        works.store.put_if_absent = put_and_cancel  # type: ignore[method-assign]
        await works.run(begun)
        await works.drain()
        assert len(accepted) == 3

    run(story)


async def ended(works: Works, files: dict[str, str]) -> str:
    begun = await works.submit(files)
    await works.run(begun)
    await works.drain()
    assert await works.store.list("working/") == []
    now = await control.now(works.store, begun)
    assert json.loads(works.output("status.json"))["state"] == now.state
    return f"{now.state}: {now.reason}"


async def broken(reward: Reward, rollouts: Sequence[ScorableRollout]) -> list[RewardScore]:
    """Fails for the second rollout of the second prompt of step 2."""
    for rollout in rollouts:
        if rollout.id == "2/1/1":
            raise scorer.RewardFailed(rollout.id, "it returned nan")
    return await variety(reward, rollouts)


def test_a_reward_that_fails_ends_the_job_with_the_rollouts_id_or_leaves_the_group_out(
    house: House,
) -> None:
    works = Works(house)
    works.judge = broken
    assert run(lambda: ended(works, JOBS["rl"])) == "failed: rollout 2/1/1: it returned nan"
    assert [event.type for event in works.log][-1] == cloudevents.JOB_FAILED
    works = Works(house)
    works.judge = broken
    lenient = {**JOBS["rl"], "job.yaml": RL + "on_reward_error: skip_group\n"}
    assert run(lambda: ended(works, lenient)) == "completed: "
    metrics = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
    assert [each["groups/refused"] for each in metrics] == [0, 1, 0, 0]
    rollouts = [json.loads(line) for line in works.output("rollouts/step-2.jsonl").splitlines()]
    refused = [each for each in rollouts if "refused" in each]
    assert [each["id"] for each in refused] == [f"2/1/{n}" for n in range(4)]
    assert all(each["advantage"] == 0 and "nan" in each["refused"] for each in refused)


@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        (
            "rl",
            "max_tokens: 6",
            "max_tokens: 510",
            "row 1 of p.jsonl: the prompt's length in tokens is",
        ),
        (
            "rl",
            "learning_rate: 0.01",
            "learning_rate: 1, grad_clip_norm: 0, weight_decay: 1.0e+6",
            "not finite",
        ),
        (
            "sft",
            "epochs: 2",
            "epochs: 2\nmax_tokens: 5",
            "of p.jsonl: its length in tokens is",
        ),
        (
            "dpo",
            "epochs: 2",
            "epochs: 2\nmax_tokens: 3",
            "of p.jsonl: its length in tokens is",
        ),
    ],
)
def test_a_users_mistake_ends_the_job_and_is_told(house: House, name: str, old: str, new: str, says: str) -> None:
    assert old in JOBS[name]["job.yaml"]
    files = {**JOBS[name], "job.yaml": JOBS[name]["job.yaml"].replace(old, new)}
    told = run(lambda: ended(Works(house), files))
    assert told.startswith("failed: ")
    assert says in told, told


def test_a_group_without_a_difference_trains_nothing_and_the_job_goes_on(
    house: House,
) -> None:
    alike = {**JOBS["rl"], "job.yaml": RL.replace("max: 4, slope: 10", "max: 1000")}
    works = Works(house)
    works.judge = scorer.score
    assert run(lambda: ended(works, alike)) == "completed: "
    metrics = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
    assert [each["groups/silent"] for each in metrics] == [3, 3, 3, 3]
    assert "grad_norm" not in metrics[0]


@pytest.mark.parametrize("loss", ["ppo", "cispo", "gspo"])
def test_every_loss_that_a_job_may_name_trains(house: House, loss: str) -> None:
    given = f"loss: {{name: {loss}, clip_low_threshold: 0.8, clip_high_threshold: 1.2}}\n"
    works = Works(house)
    assert run(lambda: ended(works, {**JOBS["rl"], "job.yaml": RL + given})) == "completed: "
    assert "loss/mean" in json.loads(works.output("metrics.jsonl").splitlines()[0])


def test_packed_sequences_are_fewer_and_every_row_counts(house: House) -> None:
    plain, packed = Works(house), Works(house)
    assert run(lambda: ended(plain, JOBS["sft"])) == "completed: "
    yaml = JOBS["sft"]["job.yaml"] + "packing: true\nmax_tokens: 64\n"
    assert run(lambda: ended(packed, {**JOBS["sft"], "job.yaml": yaml})) == "completed: "
    sums = []
    for works in (plain, packed):
        metrics = [json.loads(line) for line in works.output("metrics.jsonl").splitlines()]
        sums.append((sum(each["tokens/counted"] for each in metrics), len(metrics)))
    assert sums[0][0] == sums[1][0]
    assert sums[1][1] < sums[0][1]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"from": {"user": "human", "assistant": "gpt"}[role], "value": content}


WORDS = ("one", "two", "three", "four")
SAME_ROWS = {
    "sft": (
        lines(*({"messages": [_said("user", a), _said("assistant", "the")]} for a in WORDS)),
        lines(*({"conversations": [_turn("user", a), _turn("assistant", "the")]} for a in WORDS)),
        lines(*({"prompt": [_said("user", a)], "completion": [_said("assistant", "the")]} for a in WORDS)),
    ),
    "dpo": (
        lines(*({"prompt": [_said("user", a)], "chosen": [_said("assistant", "the")],
                 "rejected": [_said("assistant", a)]} for a in WORDS)),
        lines(*({"chosen": [_said("user", a), _said("assistant", "the")],
                 "rejected": [_said("user", a), _said("assistant", a)]} for a in WORDS)),
        lines(*({"conversations": [_turn("user", a)], "chosen": _turn("assistant", "the"),
                 "rejected": _turn("assistant", a)} for a in WORDS)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME_ROWS)
def test_the_same_rows_in_any_form_train_the_same_adapter_bit_for_bit(house: House, kind: str) -> None:
    def adapter(data: str) -> bytes:
        works, marked = Works(house), "\ufeff" + data
        files = {"job.yaml": JOBS[kind]["job.yaml"], "p.jsonl": marked, "e.jsonl": marked}
        assert run(lambda: ended(works, files)) == "completed: "
        return works.adapter()

    adapters = [adapter(data) for data in SAME_ROWS[kind]]
    assert adapters[1:] == adapters[:1] * 2


def test_bells_that_nobody_should_have_rung_are_poison_and_harm_no_job(
    house: House,
) -> None:
    async def story() -> None:
        works = Works(house)
        begun = await works.submit(JOBS["sft"])
        (there,) = await revive.first(works.services, begun)
        wrongs: tuple[tuple[Function, Event], ...] = (
            ("sample", there),  # of a job that has nothing to sample
            ("reward", there),
            ("train_step", replace(there, subject="local/j")),
            ("train_step", replace(there, subject="../j/0123456789abcdef")),
            (
                "train_step",
                replace(there, subject="local/j/0123456789abcdef"),
            ),  # never started
        )
        for target, wrong in wrongs:
            with pytest.raises(InvalidField) as caught:
                await works.call(target, wrong)
            assert caught.value.status == 422, "a Broker buries it at once"
        await works.run(begun)
        assert (await control.now(works.store, begun)).state == "completed"

    run(story)


def test_a_job_that_is_cancelled_while_it_samples_leaves_nothing_for_the_log(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples under way are dropped, and nobody is told of tasks whose end was not looked at."""
    monkeypatch.setattr("knapper.jobs.rollouts._WATCH_S", 0.01)
    said: list[str] = []

    async def story() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(str(context)))
        works, sampling = Works(house), asyncio.Event()
        begun = await works.submit(JOBS["rl"])
        put = works.store.put_if_absent

        async def put_no_rollouts(name: str, data: bytes) -> bool:
            if "/rollouts/" in name:
                sampling.set()
                await asyncio.Event().wait()
            return await put(name, data)

        works.store.put_if_absent = put_no_rollouts  # type: ignore[method-assign]
        delivered = asyncio.ensure_future(works.deliver())
        await sampling.wait()
        await control.ask(works.store, begun, "cancelled", "enough", works.clock())
        await delivered
        assert json.loads(works.output("status.json"))["state"] == "cancelled"
        gc.collect()
        await asyncio.sleep(0)

    run(story)
    gc.collect()
    assert said == []


async def always_nothing(_reward: Reward, rollouts: Sequence[ScorableRollout]) -> list[RewardScore]:
    return [RewardScore(0.0, {}) for _ in rollouts]


async def _alarms(works: Works, begun: Start) -> list[Alarm]:
    await works.run(begun)
    assert (await control.now(works.store, begun)).state == "completed"
    return await Alarms(works.store).newest(begun.run)


@pytest.mark.parametrize(("name", "ages"), [("rl", [0, 0, 0, 0]), ("rl-ahead", [0, 1, 1, 1])])
def test_every_pass_of_a_job_says_which_weights_drew_its_data_and_raises_no_alarm(
    house: House, name: str, ages: list[int]
) -> None:
    async def story() -> tuple[list[Operation], list[Alarm]]:
        works = Works(house)
        begun = await works.submit(JOBS[name])
        raised = await _alarms(works, begun)
        found = [each async for group in history.operations(works.store, begun.run) for each in group]
        return sorted(found, key=lambda each: each.seq), raised

    operations, raised = run(story)
    assert raised == []
    passes = [each.provenance for each in operations if each.kind == "forward_backward"]
    drawn = [each.drawn[0] for each in passes if each is not None]
    assert [step - each.step for step, each in enumerate(drawn)] == ages
    assert [bool(each.digest) for each in drawn] == [each.step > 0 for each in drawn]
    assert {each.sampler for each in drawn} == {"engine float32"}


@pytest.mark.parametrize(
    ("old", "new", "name", "words"),
    [
        ("max_tokens: 6", "max_tokens: 6, temperature: 0.5", "wrong_temperature", "were drawn with temperature 0.5"),
        ("{prompts: 3, samples: 4}", "{prompts: 4, samples: 2}", "degenerate_groups", "in the last 16 groups"),
    ],
)
def test_a_job_that_teaches_otherwise_than_it_seems_is_told_once(
    house: House, old: str, new: str, name: str, words: str
) -> None:
    async def story() -> list[Alarm]:
        works = Works(house)
        if name == "degenerate_groups":
            works.judge = always_nothing
        return await _alarms(works, await works.submit({**JOBS["rl"], "job.yaml": RL.replace(old, new)}))

    (alarm,) = run(story)
    assert alarm.name == name
    assert words in alarm.message
