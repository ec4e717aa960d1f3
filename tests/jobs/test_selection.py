"""The best version and the early end: what decides, and whole jobs that come to the same end whatever is killed."""

import json
from collections.abc import Sequence

import pytest

from knapper.ids import LOCAL_TENANT, number
from knapper.jobs import control, listings, schedule, selection, spec
from knapper.jobs.names import FINAL, STEP, Start
from knapper.jobs.spec import AnyJob
from knapper.jobs.yaml_document import JobError
from knapper.state.checkpoints import Checkpoints
from knapper.state.job_records import Evaluated, Spent
from tests.jobs.services import lines
from tests.jobs.works import House, Malice, Works, run

NAN = float("nan")
CHOICE = b"evaluate: {data: e.jsonl, every: 2}\n"


def job(kind: str, more: str = "") -> AnyJob:
    needs = "reward: {name: exact_match}\n" if kind == "rl" else ""
    return spec.parse(f"kind: {kind}\ndata: p.jsonl\nsteps: 20\n{needs}".encode() + CHOICE + more.encode()).job


def evaluations(name: str, values: Sequence[float]) -> dict[int, Evaluated]:
    """Of versions 0, 2, 4, ..."""
    return {
        2 * n: Evaluated(
            next_seq=1, metrics={name: value}, tokens=0, bytes=0, spent=Spent(), began_at=0.0, ended_at=0.0
        )
        for n, value in enumerate(values)
    }


@pytest.mark.parametrize(
    ("kind", "name", "values", "best"),
    [
        ("sft", "loss/mean", [0.1, 3.0, 2.0, 2.5], 4),
        ("dpo", "loss/mean", [0.1, 3.0, 2.0, 2.5], 4),
        ("rl", "reward/mean", [9.0, 1.0, 2.0, 2.0], 4),
        ("rl", "reward/mean", [9.0, NAN, -2.0, NAN], 4),
        ("rl", "reward/mean", [9.0, NAN], 2),
        ("sft", "loss/mean", [0.1], None),
    ],
)
def test_the_first_of_the_best_trained_versions_is_chosen(
    kind: str, name: str, values: list[float], best: int | None
) -> None:
    assert selection.best(job(kind), evaluations(name, values)) == best


def test_a_metric_of_dpo_is_chosen_and_its_direction_with_it() -> None:
    chosen = job("dpo", "keep: best\n")
    assert selection.metric(chosen) == "loss/mean"
    yaml = b"kind: dpo\ndata: p\nsteps: 9\nevaluate: {data: e, every: 1, metric: accuracy/mean}\nkeep: best\n"
    assert selection.best(spec.parse(yaml).job, evaluations("accuracy/mean", [0.0, 0.5, 0.9, 0.7])) == 4


@pytest.mark.parametrize(
    ("stop_early", "losses", "stops"),
    [
        ("{patience: 2}", [9, 3, 2, 2], False),
        ("{patience: 2}", [9, 3, 2, 2, 2], True),
        ("{patience: 2}", [1, 3, 2.9, 2.8], False),  # the untrained version counts for nothing
        ("{patience: 2}", [9, 3, 4, 2, 4], False),  # in a row
        ("{patience: 2, min_delta: 0.5}", [9, 3, 2.6, 2.5], True),  # 2.5 is not better than 3 by more than 0.5
        ("{patience: 2, min_delta: 0.5}", [9, 3, 2.6, 2.4], False),  # small gains add up: the mark stays at 3
        ("{patience: 1}", [9, 3, NAN], True),
        ("{patience: 1}", [9, 3], False),
        ("{patience: 1}", [9], False),
    ],
)
def test_a_job_stops_after_evaluations_in_a_row_that_are_not_better(
    stop_early: str, losses: list[float], stops: bool
) -> None:
    chosen = job("sft", f"stop_early: {stop_early}\n")
    assert selection.stops(chosen, evaluations("loss/mean", losses)) is stops
    assert not selection.stops(job("sft", "keep: best\n"), evaluations("loss/mean", losses))


@pytest.mark.parametrize(
    ("more", "field", "says"),
    [
        ("keep: best\n", "keep", "only beside `evaluate:`"),
        ("stop_early: {}\n", "stop_early", "only beside `evaluate:`"),
        ("keep: best\nevaluate: {data: e}\n", "evaluate.every", "1 or more"),
        ("stop_early: {}\nevaluate: {data: e}\n", "evaluate.every", "1 or more"),
        ("keep: first\n", "keep", "first"),
        ("stop_early: {patience: 0}\n", "stop_early.patience", ">= 1"),
        ("stop_early: {min_delta: -1}\n", "stop_early.min_delta", ">= 0"),
        ("stop_early: {metric: loss}\n", "stop_early.metric", "patience, min_delta"),
        ("evaluate: {data: e, metric: loss/mean}\n", "evaluate.metric", "data, every"),
    ],
)
def test_what_cannot_choose_is_refused(more: str, field: str, says: str) -> None:
    with pytest.raises(JobError) as caught:
        spec.parse(f"kind: sft\ndata: p\nsteps: 5\n{more}".encode())
    assert (caught.value.field, says in str(caught.value)) == (field, True), str(caught.value)


def test_versions_that_may_be_the_last_are_those_that_are_evaluated() -> None:
    chosen = job("sft", "stop_early: {}\n")
    assert [schedule.decided(chosen, version) for version in range(6)] == [0, 0, 2, 2, 4, 4]
    assert schedule.decided(job("sft"), 4) == 0


SFT = """\
kind: sft
data: p.jsonl
steps: 12
batch: {sequences: 2}
lora: {rank: 4}
optimizer: {learning_rate: 0.05, schedule: constant}
evaluate: {data: e.jsonl, every: 2}
"""
RL = """\
kind: rl
data: p.jsonl
steps: 9
batch: {prompts: 2, samples: 4}
sampling: {max_tokens: 6}
lora: {rank: 4}
optimizer: {learning_rate: 0.05, schedule: constant}
reward: {name: length, max: 4, slope: 10}
evaluate: {data: e.jsonl, every: 2}
max_staleness: 1
"""
STOPS = "keep: best\nstop_early: {patience: 2, min_delta: 5}\n"  # nothing improves by that much
SENTENCES = {
    "p.jsonl": lines(*({"prompt": f"{n} and", "completion": " the one"} for n in "abcde")),
    "e.jsonl": lines({"prompt": "f and", "completion": "in a thin line"}),
}
PROMPTS = {
    "p.jsonl": lines(*({"prompt": f"the {word} and"} for word in ("in", "on", "her"))),
    "e.jsonl": lines({"prompt": "and the"}, {"prompt": "in a"}),
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("tiny"))


async def done(works: Works, yaml: str) -> tuple[Works, Start]:
    begun = await works.submit({"job.yaml": yaml, **(PROMPTS if yaml.startswith("kind: rl") else SENTENCES)})
    await works.run(begun)
    assert (await control.now(works.store, begun)).state == "completed", await control.now(works.store, begun)
    await works.drain()
    return works, begun


def weights_of(works: Works, step: int, yaml: str) -> bytes:
    """The adapter of a job that is no longer than this."""
    short: Works = run(lambda: done(Works(works.house), yaml.replace("steps: 12", f"steps: {step}")))[0]
    return short.adapter()


def test_a_job_stops_early_and_publishes_its_best_step(house: House) -> None:
    works, begun = run(lambda: done(Works(house), SFT + STOPS))
    evaluation = json.loads(works.output("evaluation.json"))
    steps = len(works.output("metrics.jsonl").splitlines())
    assert steps == 6, "the first evaluation of a trained version, and two that are not better"
    losses = {2: evaluation["during"][0], 4: evaluation["during"][1], 6: evaluation["after"]}
    best = min(losses, key=lambda step: losses[step]["loss/mean"])
    assert best < 6, "or this test shows nothing"
    assert evaluation["best"] == {"step": best, "metric": "loss/mean", "value": losses[best]["loss/mean"]}
    reason = run(lambda: control.now(works.store, begun)).reason
    assert reason.startswith("stopped early after step 6 of 12: loss/mean had not improved in 2 evaluations; ")
    assert f"the adapter is that of step {best}, the best: loss/mean " in reason
    assert works.adapter() == weights_of(works, best, SFT)
    told = run(lambda: listings.whole(works.services, LOCAL_TENANT, "j", 0, lambda *_: None))
    assert (told["state"], told["reason"], told["step"], told["steps"]) == ("completed", reason, 6, 12)
    assert told["evaluation"] == evaluation


def test_the_last_step_is_kept_unless_the_best_is_asked_for(house: House) -> None:
    last, _ = run(lambda: done(Works(house), SFT + STOPS.replace("keep: best\n", "")))
    assert len(last.output("metrics.jsonl").splitlines()) == 6
    assert last.adapter() == weights_of(last, 6, SFT)
    best, begun = run(lambda: done(Works(house), SFT + "keep: best\n"))
    chosen = json.loads(best.output("evaluation.json"))["best"]["step"]
    assert len(best.output("metrics.jsonl").splitlines()) == 12
    assert best.adapter() == weights_of(best, chosen, SFT)
    assert run(lambda: control.now(best.store, begun)).reason.startswith(f"the adapter is that of step {chosen}, ")


def test_only_the_final_checkpoints_are_left(house: House) -> None:
    works, begun = run(lambda: done(Works(house), SFT + STOPS))
    checkpoints = Checkpoints(works.store, works.clock)
    names = run(lambda: checkpoints.labels(LOCAL_TENANT, begun.run))
    assert {(entry.path.kind, entry.path.name) for entry in names} == {("weights", FINAL), ("sampler_weights", FINAL)}


@pytest.mark.parametrize(("keep", "stored"), [("best", 2), ("last", 0)])
def test_while_a_job_runs_only_the_best_state_and_the_newest_are_stored(house: House, keep: str, stored: int) -> None:
    async def story() -> int:
        works = Works(house)
        begun = await works.submit({"job.yaml": f"{SFT}keep: {keep}\n", **SENTENCES})
        checkpoints, most, extend = Checkpoints(works.store, works.clock), 0, works.folder.extend

        async def count(name: str, data: bytes) -> None:
            nonlocal most
            most = max(most, len(await checkpoints.labels(LOCAL_TENANT, f"{begun.run}/weights/{STEP}")))
            await extend(name, data)

        works.folder.extend = count  # type: ignore[method-assign]  # counts, then calls it
        await works.run(begun)
        return most

    assert run(story) == stored


@pytest.mark.parametrize("yaml", [SFT + STOPS, RL + STOPS, RL + "keep: best\n"], ids=["sft", "rl", "rl-keeps"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_is_killed_the_end_is_the_same_bit_for_bit(house: House, yaml: str, seed: int) -> None:
    calm, begun = run(lambda: done(Works(house), yaml))
    malice = Malice(lose=0.2, copies_max=5, shuffle=True, kill=0.1)
    wild, again = run(lambda: done(Works(house, seed, malice, slice_s=0.02), yaml))
    assert wild.adapter() == calm.adapter()
    assert wild.output("evaluation.json") == calm.output("evaluation.json")
    ended = [run(lambda: control.now(calm.store, begun)).reason, run(lambda: control.now(wild.store, again)).reason]
    assert ended[0] == ended[1]
    assert ("stopped early after step 6 of " in ended[0]) is ("stop_early" in yaml)
    assert "the adapter is that of step " in ended[0]


def test_rl_samples_nothing_that_it_may_never_train(house: House) -> None:
    works, begun = run(lambda: done(Works(house), RL + STOPS))
    rounds = run(lambda: works.store.list(begun.rounds("steps")))
    assert {name.removeprefix(begun.rounds("steps")).split("/")[0] for name in rounds} == {number(n) for n in range(6)}


def test_an_evaluation_that_the_next_steps_wait_for_wakes_them_itself(house: House) -> None:
    async def story() -> str:
        works = Works(house)
        begun = await works.submit({"job.yaml": RL + STOPS, **PROMPTS})
        await works.drain()  # no lost bell is made good
        return (await control.now(works.store, begun)).state

    assert run(story) == "completed"
