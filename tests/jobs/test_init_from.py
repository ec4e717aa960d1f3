"""Jobs that begin with a checkpoint's weights."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from knapper.errors import UserError
from knapper.ids import LOCAL_TENANT, Tenant, TinkerPath
from knapper.jobs import control, origins, spec
from knapper.state.alarms import Alarms
from knapper.state.checkpoints import Checkpoints
from knapper.state.job_records import Rollouts, read
from knapper.state.journal import bundles
from tests.jobs.test_works import JOBS, house
from tests.jobs.works import House, Works, run

__all__ = ["house"]


async def ended(works: Works, files: Mapping[str, str], job: str) -> str:
    begun = await works.submit(files, job)
    await works.run(begun)
    await works.drain()
    now = await control.now(works.store, begun)
    return f"{now.state}: {now.reason}"


@pytest.mark.parametrize("kind", ["rl", "sft", "dpo"])
def test_a_job_that_begins_with_another_ones_checkpoint_is_evaluated_first_as_that_one_was_last(
    house: House, kind: str
) -> None:
    """The same weights on the same held-out rows: the same figures, and for rl the same completions."""

    async def story() -> None:
        works = Works(house)
        first = await works.submit(JOBS[kind])
        await works.run(first)
        await works.drain()
        path = TinkerPath(first.run, "weights", "final")
        yaml = f"{JOBS[kind]['job.yaml']}init_from: {path}\nseed: 9\n"
        assert await ended(works, {**JOBS[kind], "job.yaml": yaml}, "k") == "completed: "
        earlier, later = (json.loads(works.output("evaluation.json", job)) for job in "jk")
        if kind != "dpo":  # whose reference is what it begins with
            assert {n: later["before"][n] for n in later["before"]} == earlier["after"]
        else:
            assert later["before"]["margin/mean"] == 0.0
        assert later["after"] != earlier["after"]
        assert works.adapter("k") != works.adapter("j")
        if kind == "rl":
            bundle = (await Checkpoints(works.store, works.clock).own(path, LOCAL_TENANT)).bundle
            index = await bundles.read_index(works.store, bundle)
            assert index is not None
            names = [n for n in await works.store.list("jobs/local/k/") if f"/steps/{0:020d}/rollouts/" in n]
            drawn = [record.drawn for n in names if (record := await read(works.store, n, Rollouts)) is not None]
            assert {each.run for each in drawn if each is not None} == {first.run}, "its first samples are the other's"
            (started,) = [n for n in await works.store.list("jobs/local/k/") if n.endswith("/started")]
            run_id = type(first)(LOCAL_TENANT, "k", started.split("/")[3]).run
            assert await Alarms(works.store).newest(run_id) == [], "and are no other adapter's"

    run(story)


def test_a_checkpoint_that_a_job_cannot_go_on_from_is_refused_with_what_is_allowed(house: House) -> None:
    async def story() -> None:
        works = Works(house)
        first = await works.submit(JOBS["sft"])
        await works.run(first)
        path = TinkerPath(first.run, "weights", "final")
        yaml, services = JOBS["sft"]["job.yaml"], works.services

        async def refused(path: str, yaml: str = yaml, tenant: str = LOCAL_TENANT, model: str = "tiny") -> str:
            job = spec.parse(f"{yaml}init_from: {path}\n".encode()).job
            with pytest.raises(UserError) as caught:
                await origins.bundle_of(services, Tenant(tenant), job, path, model)
            return str(caught.value)

        assert "lora.rank is 8; allowed: 4" in await refused(str(path), yaml.replace("rank: 4", "rank: 8"))
        told = await refused(str(path), yaml.replace("rank: 4", "rank: 4, train_mlp: false"))
        assert "lora.train_mlp is False; allowed: true" in told
        told = await refused(str(path), yaml.replace("rank: 4", "rank: 4, alpha: 8"))
        assert "Write `alpha: 32` below `lora:`" in told
        for nothing in (str(TinkerPath(first.run, "weights", "none")), str(path)):
            told = await refused(nothing, tenant="other" if nothing == str(path) else LOCAL_TENANT)
            assert "a checkpoint that this tenant may read" in told
        assert "a checkpoint of other, and this is one of tiny" in await refused(str(path), model="other")
        assert "tinker://<run>/" in await refused("/etc/passwd")
        assert await origins.bundle_of(services, LOCAL_TENANT, spec.parse(yaml.encode()).job, str(path), "tiny"), (
            "and what can be gone on from, is"
        )

    run(story)


def test_the_example_of_the_page_is_a_part_of_a_job() -> None:
    page = (Path(__file__).parents[2] / "docs" / "jobs.md").read_text()
    example = page.partition("### Begin with a checkpoint")[2].partition("```yaml\n")[2].partition("```")[0]
    job = spec.parse(f"kind: sft\ndata: d\nsteps: 9\n{example}".encode()).job
    assert job.init_from == "tinker://RUN/weights/final"
