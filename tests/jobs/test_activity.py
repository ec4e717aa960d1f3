"""What a job is doing now, since when, and when it may end: as a client is told it."""

from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from knapper.cli import jobs_client
from knapper.ids import LOCAL_TENANT
from knapper.jobs import control, listings, outputs, progress, starts
from knapper.jobs.activity import seconds_left
from knapper.jobs.names import Start
from knapper.jobs.presence import Presence, Present
from knapper.jobs.spec import decode, parse
from knapper.local.state import ProcessTable, presence, role_of
from knapper.state.job_records import Evaluated, Rollouts, Scores, Spent, Trained, encode
from knapper.state.layout import ObjectKind
from tests.jobs.test_works import JOBS, RL
from tests.jobs.works import House, Works, run

READY, NOTHING = Presence("ready"), Spent()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("tiny"))


async def told(works: Works, present: Present = lambda _, __: READY) -> dict[str, Any]:
    return await listings.whole(works.services, LOCAL_TENANT, "j", 0, present)


def phase(shown: dict[str, Any]) -> tuple[Any, ...]:
    doing = shown["activity"]
    return doing["phase"], doing["step"], doing["done"], doing["of"]


def seconds(iso: str) -> float:
    return datetime.fromisoformat(iso).timestamp()


async def sampled(works: Works, start: Start, kind: Any, n: int, prompts: int, scored: int = 0) -> None:
    """Rollouts and scores of the first prompts of a round, as the functions leave them."""
    for part in range(prompts):
        record = Rollouts(row=0, prompt_tokens=b"", rollouts=[], began_at=0.0, ended_at=0.0)
        await works.store.put_if_absent(start.rollouts(kind, n, part), encode(record))
    for part in range(scored):
        await works.store.put_if_absent(
            start.scores(kind, n, part), encode(Scores(scores=[], began_at=0.0, ended_at=0.0))
        )


def trained(began_at: float, ended_at: float, before_at: float = 0.0, spent: Spent = NOTHING) -> Trained:
    return Trained(
        next_seq=1, steps=4, metrics={}, tokens=0, bytes=0, spent=spent, before_at=before_at, began_at=began_at,
        ended_at=ended_at,
    )  # fmt: skip


def evaluated(began_at: float, ended_at: float, spent: Spent = NOTHING) -> Evaluated:
    return Evaluated(next_seq=1, metrics={}, tokens=0, bytes=0, spent=spent, began_at=began_at, ended_at=ended_at)


def test_the_phases_of_a_job_of_reinforcement_learning(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        start = await works.submit(JOBS["rl"])
        assert phase(await told(works)) == ("sampling", 1, 0, 3)
        await sampled(works, start, "steps", 0, 2)
        assert phase(await told(works)) == ("sampling", 1, 2, 3)
        await sampled(works, start, "steps", 0, 3, scored=1)
        assert phase(await told(works)) == ("evaluating", 0, 0, 2), "the sampler goes on with it"
        await sampled(works, start, "evaluations", 0, 1)
        assert phase(await told(works)) == ("evaluating", 0, 1, 2)
        await sampled(works, start, "evaluations", 0, 2)
        assert phase(await told(works)) == ("scoring", 1, 1, 3)
        await sampled(works, start, "steps", 0, 3, scored=3)
        assert phase(await told(works)) == ("training", 1, None, None)
        for step in range(4):
            await works.store.put_if_absent(start.trained(step), encode(trained(1.0, 2.0)))
        for version in (0, 2):
            await works.store.put_if_absent(start.evaluated(version), encode(evaluated(1.0, 2.0)))
        assert phase(await told(works)) == ("evaluating", 4, 0, 2)
        await sampled(works, start, "evaluations", 4, 2, scored=1)
        assert phase(await told(works)) == ("evaluating", 4, 1, 2), "what is left of it is to be scored"
        await works.store.put_if_absent(start.evaluated(4), encode(evaluated(1.0, 2.0)))
        assert phase(await told(works)) == ("saving", None, None, None)

    run(story)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_phases_of_a_job_over_rows(house: House, kind: str) -> None:
    async def story() -> None:
        works = Works(house)
        start = await works.submit(JOBS[kind])
        assert phase(await told(works)) == ("evaluating", 0, None, 5)
        await works.store.put_if_absent(start.evaluated(0), encode(evaluated(1.0, 2.0)))
        assert phase(await told(works)) == ("training", 1, None, None)

    run(story)


def test_until_a_function_takes_it_up_a_job_waits_for_the_engine(house: House) -> None:
    """Where nobody knows the processes, as on a cluster, the function's own mark tells."""

    async def story() -> None:
        works = Works(house, slice_s=0.0)
        await works.submit(JOBS["rl"])
        before = await told(works, lambda *_: None)
        assert phase(before) == ("waiting for the engine", None, None, None)
        assert before["activity"]["since"] == before["started_at"]
        await works.deliver()
        after = await told(works, lambda *_: None)
        assert phase(after) == ("sampling", 1, 0, 3)
        assert seconds(after["activity"]["since"]) > seconds(before["started_at"])

    run(story)


# Of rl only the ends: between them three functions take turns.
COURSES: dict[str, list[tuple[Any, ...]]] = {
    "sft": [("waiting for the engine", None), ("evaluating", 0), ("training", 1), ("training", 2), ("evaluating", 2),
            ("training", 3), ("training", 4), ("evaluating", 4), ("training", 5), ("saving", None)],
    "rl": [("waiting for the engine", None), ("sampling", 1), ("saving", None)],
}  # fmt: skip


@pytest.mark.parametrize("kind", COURSES)
def test_status_json_says_what_is_next_from_the_first_moment_to_the_last(house: House, kind: str) -> None:
    async def story() -> None:
        works, seen = Works(house), list[dict[str, Any]]()
        publish = works.services.exchange.publish

        async def watched(name: str, data: bytes) -> None:
            if name.endswith("/status.json"):
                seen.append(msgspec.json.decode(data))
            await publish(name, data)

        works.services.exchange.publish = watched  # type: ignore[method-assign]
        start = await works.submit(JOBS[kind])
        assert [phase(each) for each in seen] == [("waiting for the engine", None, None, None)]
        assert seen[0]["activity"]["since"] == seen[0]["at"]
        assert (seen[0]["state"], seen[0]["step"]) == ("running", 0)
        await works.run(start)
        doing = list(dict.fromkeys(phase(each)[:2] for each in seen if each["activity"]))
        assert (doing if kind == "sft" else [*doing[:2], doing[-1]]) == COURSES[kind]
        last = seen[-1]
        assert (last["state"], last["step"], last["activity"]) == ("completed", last["steps"], None)

    run(story)


def test_a_status_that_was_read_before_the_end_does_not_stay(house: House) -> None:
    """Two functions publish at once: the one that read earlier writes later."""

    async def story() -> None:
        works = Works(house)
        start = await works.submit(JOBS["sft"])
        publish = works.services.exchange.publish

        async def overtaken(name: str, data: bytes) -> None:
            if msgspec.json.decode(data)["state"] == "running":
                await control.change(works.store, start, "cancelled", "enough", works.clock())
            await publish(name, data)

        works.services.exchange.publish = overtaken  # type: ignore[method-assign]
        record = await starts.started(works.services, start)
        await outputs.publish_status(works.services, record)
        status = msgspec.json.decode(works.output("status.json"))
        assert (status["state"], status["reason"], status["activity"]) == ("cancelled", "enough", None)

    run(story)


def test_of_processes_on_this_machine_it_is_known_whether_they_load(house: House, tmp_path: Path) -> None:
    async def story() -> None:
        works, processes = Works(house), ProcessTable(tmp_path)
        await works.submit(JOBS["rl"])

        async def now() -> tuple[str, str]:
            doing = (await told(works, lambda *asked: presence(tmp_path, *asked)))["activity"]
            return doing["phase"], doing["since"]

        processes.set("gateway", 1, 2)
        assert (await now())[0] == "waiting for the engine"
        processes.set("engine", 3, 4, loading_since=1_000_007.0)
        assert await now() == ("loading the model", "1970-01-12T13:46:47.000+00:00")
        processes.set("engine", 3, 4)
        assert (await now())[0] == "sampling"
        processes.remove("engine")
        processes.set("train_step", 3, 4)  # a process for each function: the one that is needed does not run
        assert (await now())[0] == "waiting for the engine"
        processes.set("sample", 3, 4)
        assert (await now())[0] == "sampling"
        base_model = (await told(works))["base_model"]
        processes.remove("sample")
        processes.set(role_of("engine", "another"), 3, 4)
        assert (await now())[0] == "waiting for the engine"
        processes.set(role_of("engine", base_model), 3, 4)
        assert (await now())[0] == "sampling"
        processes.clear()
        assert presence(tmp_path, "sample", "m") is None

    run(story)


def test_a_job_that_cannot_go_on_waits_and_says_why(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        start = await works.submit(JOBS["rl"])
        works.clock.at += 50
        await control.note(works.store, start, "waits: the model cannot be served", works.clock())
        shown = await told(works)
        assert phase(shown) == ("waiting", None, None, None)
        assert "; waits: the model cannot be served" in jobs_client.doing(shown)
        assert seconds(shown["activity"]["since"]) - seconds(shown["started_at"]) == pytest.approx(50, abs=1)
        await control.note(works.store, start, "", works.clock())
        assert phase(await told(works)) == ("sampling", 1, 0, 3)

    run(story)


@pytest.mark.parametrize(
    ("activity", "text"),
    [
        (("loading the model", None, None, None), "loading the model, for 0:09"),
        (("evaluating", 0, 12, 40), "evaluating before step 1: 12 of 40 prompts, for 0:09"),
        (("evaluating", 2, None, 5), "evaluating after step 2/8: 5 rows, for 0:09"),
        (("training", 3, None, None), "training step 3/8, for 0:09"),
    ],
)
def test_what_a_job_does_reads_as_a_line(activity: tuple[Any, ...], text: str) -> None:
    named = dict(zip(("phase", "step", "done", "of"), activity, strict=True))
    assert (
        jobs_client.doing({"state": "running", "steps": 8, "reason": "", "activity": {**named, "seconds": 9.2}}) == text
    )


def test_a_job_that_ended_does_nothing_and_took_as_long_as_it_took(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        start = await works.submit(JOBS["sft"])
        assert (await told(works))["ended_at"] is None
        works.clock.at += 100
        await control.change(works.store, start, "cancelled", "enough", works.clock())
        works.clock.at += 1000
        shown = await told(works)
        assert (shown["activity"], shown["seconds_left"], shown["ends_at"]) == (None, None, None)
        assert 100 < shown["elapsed_seconds"] < 101
        assert seconds(shown["ended_at"]) - seconds(shown["started_at"]) == pytest.approx(100, abs=1)

    run(story)


def test_the_end_is_estimated_from_what_steps_took(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        start = await works.submit(JOBS["rl"])
        assert (await told(works))["seconds_left"] is None, "nobody knows before the first step"
        at = works.clock.at
        # It waited 50 s for its engine, which counts neither in the step nor in the evaluation that took 5 s.
        first = trained(at + 55, at + 60, before_at=at, spent=Spent(busy=[(at + 50, at + 54)]))
        await works.store.put_if_absent(start.trained(0), encode(first))
        await works.store.put_if_absent(
            start.evaluated(0), encode(evaluated(at + 60, at + 60, Spent(busy=[(at + 51, at + 56)])))
        )
        works.clock.at = at + 63
        shown = await told(works)
        # three steps of 10 s, of which one is at work for 3 s, and the last evaluation
        assert shown["seconds_left"] == pytest.approx(3 * 10 - 3 + 5, abs=0.1)
        left_s = seconds(shown["ends_at"]) - works.clock.at
        assert left_s == pytest.approx(shown["seconds_left"], abs=0.1)
        absent = await told(works, lambda *_: Presence("absent"))
        assert absent["seconds_left"] == pytest.approx(3 * 10 + 5, abs=0.01), "nobody works on it"

    run(story)


def test_an_estimate_counts_the_evaluations_that_are_to_come() -> None:
    sft = parse(b"kind: sft\ndata: p\nsteps: 4\nevaluate: {data: e, every: 2}\n").job
    steps, looked = [trained(10.0, 14.0, before_at=10.0)], {0: evaluated(0.0, 3.0)}
    assert seconds_left(sft, steps, looked, 1, 4, 0.0) == 3 * 4 + 2 * 3  # after steps 2 and 4
    assert seconds_left(sft, steps, looked | {2: evaluated(0.0, 5.0)}, 4, 4, 1.0) == 4 - 1, "what such a look takes"
    assert seconds_left(sft, [], looked, 0, 4, 0.0) is None
    rl = parse(RL.encode()).job
    assert seconds_left(rl, steps, looked, 1, 4, 100.0) == 3 * 4 + 3 - 4, "a step that takes longer is about to be done"


def test_marks_of_functions_are_no_progress(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        start = await works.submit(JOBS["rl"])
        await works.run(start)
        outline = progress.Outline(start, decode((await starts.started(works.services, start)).spec_json), 2)
        now = await progress.ProgressReader(works.store).look(outline, 4)
        assert (now.trained, progress.finished(outline, now, 4)) == (4, True)
        marks = await works.store.list(ObjectKind.JOB_TAKEN.under(start.tenant, start.job, start.id))
        assert [name.split("/")[5] for name in marks] == ["reward", "sample", "train_step"], (
            "one a function and process"
        )

    run(story)
