"""Whole sweeps: every trial is a job, once, and the best of them is the sweep's, whatever is lost or killed."""

import itertools
import json
from functools import partial

import pytest

from knapper.errors import InvalidField, StoreError
from knapper.events import cloudevents
from knapper.ids import LOCAL_TENANT, RunId
from knapper.jobs import control, deletion, inbox, job_names, listings, notifications, revive, starts
from knapper.jobs.job_files import Folders
from knapper.jobs.names import Start
from knapper.jobs.revive import Seen
from knapper.jobs.spec import decode
from knapper.jobs.sweep import dispatch, halt, trials
from knapper.state.job_records import Started, read
from knapper.store.memory import MemoryStore
from tests.jobs.services import serve
from tests.jobs.sweep.sweeps import BASE, GRID, SEARCH, SMALL, calm, comparable, ended, files, swept, table
from tests.jobs.works import House, Malice, Process, Works, run

WILD = Malice(lose=0.3, copies_max=3, shuffle=True, kill=0.1)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("tiny"))


def test_a_grid_ends_with_a_table_and_the_best_adapter_under_its_own_name(house: House) -> None:
    works = calm(house, GRID)

    async def story() -> None:
        shown = table(works)
        assert [row["values"] for row in shown["trials"]] == [
            {"optimizer.learning_rate": rate, "lora.rank": rank} for rate in (0.001, 0.03) for rank in (2, 4)
        ]
        assert [row["job"] for row in shown["trials"]] == ["j.1", "j.2", "j.3", "j.4"]
        assert {row["state"] for row in shown["trials"]} == {"completed"}
        assert (shown["metric"], shown["goal"], shown["planned"], shown["ended"]) == ("loss/mean", "minimize", 4, 4)
        losses = {row["job"]: row["value"] for row in shown["trials"]}
        for job, loss in losses.items():
            assert loss == json.loads(works.output("evaluation.json", job))["after"]["loss/mean"]
        best = min(losses, key=lambda job: losses[job])
        assert shown["best"]["job"] == best
        assert works.adapter() == works.adapter(best)
        assert works.adapter() not in [works.adapter(job) for job in losses if job != best]
        status = json.loads(works.output("status.json"))
        assert (status["state"], status["step"], status["steps"], status["sweep"]) == ("completed", 4, 4, True)
        assert status["reason"].startswith(f"the best of 4 trials is {best}: loss/mean ")
        assert await works.store.list("working/") == []
        run_of_best = await job_names.adapter_of(works.store, LOCAL_TENANT, "j")
        assert run_of_best == await job_names.adapter_of(works.store, LOCAL_TENANT, best)
        assert RunId(shown["best"]["checkpoint"].split("/")[2]) == run_of_best

    run(story)


def test_a_trial_is_the_job_that_its_values_make_bit_for_bit(house: House) -> None:
    works = calm(house, GRID)

    async def story() -> None:
        whole = await listings.whole(works.services, LOCAL_TENANT, "j.3", 0, lambda *_: None)
        assert whole["trial_of"] == "j"
        alone = Works(house)
        begun = await alone.submit(files("") | {"job.yaml": whole["job_yaml"]})
        await alone.run(begun)
        assert alone.adapter() == works.adapter("j.3")
        assert alone.output("evaluation.json") == works.output("evaluation.json", "j.3")
        published = Works(house)
        begun = await published.submit(files("") | {"job.yaml": works.output("best.yaml")})
        await published.run(begun)
        assert published.adapter() == works.adapter(), "best.yaml is a job that makes the best adapter"

    run(story)


@pytest.mark.parametrize("section", [GRID, SEARCH % 1], ids=["grid", "tpe"])
@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 40))])
def test_whatever_is_lost_doubled_or_killed_the_table_is_the_same(house: House, section: str, seed: int) -> None:
    """With one trial at a time, a search depends on nothing but its seed and the values before."""
    wild = run(lambda: swept(house, section, seed, WILD))
    assert comparable(wild) == comparable(calm(house, section))
    assert wild.adapter() == calm(house, section).adapter()

    async def starts() -> list[str]:
        return [name for name in await wild.store.list("jobs/") if name.endswith("/started")]

    assert len(run(starts)) == 1 + len(table(wild)["trials"]), "no trial has two jobs"


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 40))])
def test_a_search_side_by_side_loses_and_doubles_nothing(house: House, seed: int) -> None:
    """Which trials have ended when the next is drawn depends on what was killed, and so may the points."""
    wild = run(lambda: swept(house, SEARCH % 3, seed, WILD))
    assert [row[0] for row in comparable(wild)] == [f"j.{n}" for n in range(1, 6)]
    assert {row[2] for row in comparable(wild)} == {"completed"}


class Dies(MemoryStore):
    """A store whose `n`th write from now on ends the process; 0: none."""

    n = 0

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        if self.n == 1:
            self.n = 0
            raise StoreError("the process dies here")
        self.n = max(0, self.n - 1)
        return await super().put_if_absent(name, data)


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.long)])
def test_the_dispatcher_may_die_before_any_write_of_its_own(house: House, stride: int) -> None:
    """Of the first look and of the one at the end; what it has rung is lost with it."""

    async def story(n: int, *, at_end: bool) -> tuple[list[object], bool]:
        works, store = Works(house), Dies()
        works.store = store
        works.services = type(works.services)(store, works.folder, works.services.notifier, works.clock)
        processes: tuple[Process, ...] = ("sample", "reward", "train_step", "gateway")
        for name in processes:
            works._begin(name)
        begun = await works.submit(files(SMALL)) if at_end else None
        if begun is None:
            await serve(store)
            works.folder.put("j", files(SMALL))
            begun = await inbox.look(works.services, LOCAL_TENANT, "j")
            assert begun is not None
        while at_end and len(await trials.read_all(store, begun)) < 2:
            await _step(works)
        while at_end and await control.runs(store, begun.trial(2)):  # it has ended, and nobody has heard of it
            await _step(works)
        store.n = n
        died = False
        try:
            await dispatch.advance(works.services, begun)
        except StoreError:
            died = True
        store.n = 0
        await works.run(begun)
        await works.drain()
        return list(comparable(works)), died

    for at_end in (False, True):
        for n in itertools.count(1, stride):
            rows, died = run(partial(story, n, at_end=at_end))
            assert rows == list(comparable(calm(house, SMALL))), f"it died before write {n}"
            if not died:
                break
        assert n > 3, "there were writes to die before"


async def _step(works: Works) -> None:
    if not works.waits():
        for event in await revive.due(works.services, Seen(), quiet_s=0):
            await works.post(event)
    await works.deliver()


def test_a_sweep_whose_bells_are_all_lost_goes_on_by_the_tick(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        begun = await works.submit(files(GRID))
        works.silence()
        seen = Seen()
        for _ in range(60):
            if not await control.runs(works.store, begun):
                break
            for event in await revive.due(works.services, seen, quiet_s=0):
                await works.post(event)
            await works.drain_once()
        assert (await control.now(works.store, begun)).state == "completed"
        assert await revive.due(works.services, seen, quiet_s=0) == []

    run(story)


@pytest.mark.parametrize("at_once", [1, 3])
def test_no_more_trials_run_than_may_at_once(house: House, at_once: int) -> None:
    async def story() -> None:
        works = Works(house, 3, Malice(copies_max=3, shuffle=True))
        begun = await works.submit(files(GRID.replace("at_once: 2", f"at_once: {at_once}")))
        most = 0
        while await control.runs(works.store, begun):
            running = [row for row in await trials.read_all(works.store, begun) if row.ended is None]
            most = max(most, len(running))
            await _step(works)
        assert most == at_once

    run(story)


def test_no_trial_begins_beyond_the_device_seconds(house: House) -> None:
    section = GRID.replace("at_once: 2", "at_once: 1, budget: {device_seconds: 1.0e-9}")
    works = run(lambda: swept(house, section))
    assert [row[0] for row in comparable(works)] == ["j.1"], "the first has used them"
    assert table(works)["device_seconds"] > 0
    lasting = run(lambda: swept(house, section.replace("1.0e-9", "1.0e+9")))
    assert len(comparable(lasting)) == 4


def test_the_metric_and_its_direction_decide(house: House) -> None:
    works = run(lambda: swept(house, GRID.replace("at_once: 2", "goal: maximize")))
    losses = {row[0]: row[3] for row in comparable(works)}
    assert table(works)["best"]["job"] == max(losses, key=lambda job: losses[job])


def test_a_trial_that_cannot_be_is_refused_in_the_table_and_the_others_go_on(house: House) -> None:
    """Each end of a range is right by itself; what is drawn between them may be wrong with another field's."""
    section = """\
sweep:
  method: random
  over:
    optimizer.warmup_steps: {low: 1, high: 3}
    steps: [3, 2]
  budget: {trials: 8}
  seed: 2
"""
    works = run(lambda: swept(house, section))
    states = {row["state"]: row for row in table(works)["trials"]}
    assert set(states) == {"completed", "refused"}
    refused = states["refused"]
    assert (refused["values"], refused["value"], refused["step"]) == (
        {"optimizer.warmup_steps": 3, "steps": 2}, None, 0,
    )  # fmt: skip
    assert "optimizer.warmup_steps is 3" in refused["reason"]


def test_a_sweep_without_any_value_fails_and_says_why(house: House) -> None:
    async def story() -> str:
        works = Works(house)
        begun = await ended(works, SMALL, BASE + "max_tokens: 2\n")
        now = await control.now(works.store, begun)
        assert table(works)["best"] is None
        assert works.log[-1].type == cloudevents.JOB_FAILED
        return f"{now.state}: {now.reason}"

    told = run(story)
    assert told.startswith("failed: none of its 2 trials has a loss/mean: ")
    assert "of p.jsonl: its length in tokens is" in told


async def _running(house: House) -> tuple[Works, Start]:
    """A sweep of which one trial has ended, and two run."""
    works = Works(house, slice_s=0.05)
    begun = await works.submit(files(GRID.replace("at_once: 2", "at_once: 1")))
    while not [row for row in await trials.read_all(works.store, begun) if row.ended is not None]:
        await _step(works)
    return works, begun


def test_a_cancelled_sweep_cancels_its_trials_and_goes_on_with_them(house: House) -> None:
    whole = comparable(calm(house, GRID))  # before: it has an event loop of its own

    async def story() -> None:
        works, begun = await _running(house)
        await control.ask(works.store, begun, "cancelled", "enough", works.clock())
        await halt.all_trials(works.services, begun)
        await works.store.delete(begun.working)
        await works.drain()
        states = [(await control.now(works.store, begun.trial(n))).state for n in (1, 2)]
        assert states == ["completed", "cancelled"]
        assert await works.store.list("working/") == []
        assert len(await trials.read_all(works.store, begun)) == 2, "nothing begins"
        await control.ask(works.store, begun, "running", "", works.clock())
        await works.store.put_if_absent(begun.working, b"")
        for event in await revive.first(works.services, begun):
            await works.post(event)
        await works.run(begun)
        await works.drain()
        assert comparable(works) == whole

    run(story)


def test_trials_end_by_the_tick_if_the_one_who_cancelled_their_sweep_died(house: House) -> None:
    async def story() -> None:
        works, begun = await _running(house)
        await control.ask(works.store, begun, "cancelled", "enough", works.clock())
        works.silence()
        for _ in range(2):
            assert await revive.due(works.services, Seen(), quiet_s=0) == []
        assert await works.store.list("working/") == []
        assert (await control.now(works.store, begun.trial(2))).reason == control.WITH_SWEEP

    run(story)


def test_a_trial_that_its_owner_cancels_has_ended_and_the_sweep_goes_on(house: House) -> None:
    async def story() -> None:
        works, begun = await _running(house)
        await control.ask(works.store, begun.trial(2), "cancelled", "cancelled by its owner", works.clock())
        await works.run(begun)
        await works.drain()
        states = [row[2] for row in comparable(works)]
        assert states == ["completed", "cancelled", "completed", "completed"]
        assert (await control.now(works.store, begun)).state == "completed"

    run(story)


def test_a_corrected_job_yaml_ends_the_sweep_before_it_with_its_trials(house: House) -> None:
    async def story() -> None:
        works, begun = await _running(house)
        works.folder.put("j", files(GRID.replace("[2, 4]", "[4]")))
        other = await inbox.look(works.services, LOCAL_TENANT, "j")
        assert other is not None
        assert (await control.now(works.store, begun)).state == "cancelled"
        assert (await control.now(works.store, begun.trial(2))).reason == control.WITH_SWEEP
        for event in await revive.first(works.services, other):
            await works.post(event)
        await works.run(other)
        await works.drain()
        assert [(row[0], row[1]["lora.rank"]) for row in comparable(works)] == [("j.1", 4), ("j.2", 4)]
        assert await inbox.look(works.services, LOCAL_TENANT, "j") is None, "the same files are the same sweep"

    run(story)


def test_deleting_a_sweep_deletes_its_trials(house: House) -> None:
    async def story() -> None:
        works = await swept(house, GRID)
        other = await works.submit(files("", BASE), "j-2")
        await works.run(other)
        await works.drain()
        erased: list[RunId] = []

        async def erase(of_run: RunId) -> None:
            erased.append(of_run)

        await deletion.mark(works.services, LOCAL_TENANT, "j")
        await deletion.delete(works.services, LOCAL_TENANT, "j", erase)
        assert [each.start.job for each in await listings.listed(works.store, LOCAL_TENANT)] == ["j-2"]
        assert not [name for name in works.folder.files if name.startswith(("jobs/local/j/", "jobs/local/j."))]
        kept = {name.split("/")[4] for name in await works.store.list("jobs/local/j.")}
        assert kept == {"control"}
        assert len(erased) == 2 * 5

    run(story)


def test_trials_read_the_files_of_their_sweep_and_functions_refuse_its_bell(house: House) -> None:
    works = calm(house, GRID)

    async def story() -> None:
        copies = [name for name in await works.store.list("jobs/") if "/files/" in name]
        assert len(copies) == 1, "trials read their sweep's"
        sweep = await listings.newest(works.store, LOCAL_TENANT, "j")
        folder = await Folders(works.store).read(sweep.start.trial(1))
        assert len(folder.rows) == 4
        bell = notifications.started(await starts.started(works.services, sweep.start))
        with pytest.raises(InvalidField, match="a job that is no sweep"):
            await works.call("train_step", bell)

    run(story)


def test_points_that_read_other_files_are_checked_before_the_sweep_begins(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        await serve(works.store)
        sweep = "sweep: {over: {data: [p.jsonl, q.jsonl]}}\n"
        works.folder.put("k", files(sweep) | {"q.jsonl": "{}\n"})
        assert await inbox.look(works.services, LOCAL_TENANT, "k") is None
        report = json.loads(works.folder.files["inbox/local/k/job.error.json"])
        assert (report["file"], report["line"]) == ("q.jsonl", 1)
        works.folder.put("k", {"q.jsonl": files("")["p.jsonl"].replace("in", "an")})
        begun = await works.submit(files(sweep) | {"q.jsonl": files("")["p.jsonl"].replace("in", "an")}, "k")
        await works.run(begun)
        record = await read(works.store, begun.trial(2).started, Started)
        assert record is not None
        assert decode(record.spec_json).data == "q.jsonl"
        assert set((await starts.started(works.services, begun)).files) == {"p.jsonl", "q.jsonl", "e.jsonl"}
        assert set(record.files) == {"q.jsonl", "e.jsonl"}

    run(story)
