"""Lists read what they tell of, and nothing else: 2000 finished things cost them as many calls as ten.

But for names, of which a bucket tells a thousand a request.
"""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.store.memory import MemoryStore
from tests.gateway.finished import lay_jobs, lay_runs, run_of
from tests.gateway.hours import HOUR_S, CountingStore, clock, gateway, lived
from tests.jobs.services import Folder, serve

Told = dict[str, Any]


async def asked(count: int) -> tuple[dict[str, Told], dict[str, dict[str, int]]]:
    """What each list answers, and what it asks of the store: each of a gateway that has just started."""
    memory = MemoryStore()
    await serve(memory)
    await lay_runs(memory, clock, count)
    await lay_jobs(memory, clock, count)
    store = CountingStore(memory)

    async def unheard(_: object) -> None:
        pass

    job_services = JobServices(store, Folder(), Notifier(unheard, clock), clock)
    async with gateway(store, job_services):
        await asyncio.sleep(6 * HOUR_S)  # what the runs used is accounted for
    end = datetime.fromtimestamp(clock() // HOUR_S * HOUR_S, UTC)
    answers, calls = {}, {}
    for path, query in (
        ("training_runs", {"limit": 5, "offset": 2}),
        ("training_runs", {"limit": 5, "offset": 5}),
        (f"training_runs/{run_of(9, 'local')}", {}),
        (f"training_runs/{run_of(9, 'local')}/checkpoints", {}),
        ("sessions", {"limit": 5}),
        ("checkpoints", {"limit": 5}),
        ("jobs", {"limit": 5}),
        ("jobs/job-3", {}),
        ("billing/usage/events", _window(end - timedelta(hours=3), end)),
        ("billing/usage/events", _window(end - timedelta(hours=12), end)),
        ("billing/usage/checkpoints/current", {}),
    ):
        async with gateway(store, job_services) as running:
            store.calls.clear()
            answer = await running.http.get(path, params=query)
            name = f"{path} {sorted(query.items())}"
            answers[name], calls[name] = answer.raise_for_status().json(), store.verbs
    return answers, calls


def _window(first: datetime, end: datetime) -> dict[str, str]:
    return {"starting_on": first.isoformat(), "ending_before": end.isoformat()}


def test_lists_cost_the_same_whatever_is_finished() -> None:
    (few_told, few), (many_told, many) = lived(lambda: asked(10)), lived(lambda: asked(2000))
    assert few.keys() == many.keys()
    names = few.keys() - {name for name in few if "usage/events" in name}
    for name in names:
        if "current" in name:
            assert many[name]["get"] == 2 * 2000, "which project each of the sessions is in whose weights are there"
        else:
            assert few[name].get("get", 0) == many[name].get("get", 0), name
        assert 0 <= many[name]["list"] - few[name]["list"] <= 4, f"{name}: names, a thousand a request"
        assert many[name].keys() <= {"get", "list"}, name
    nothing, everything = (name for name in few if "usage/events" in name)
    assert few_told[nothing]["data"] == many_told[nothing]["data"] == []
    assert few[nothing] == {"list": 5}
    assert many[nothing] == {"list": 7}, "of times that are not asked for, nothing"
    _expect_all(many_told[everything], 2000)
    assert many[everything]["list"] == 9
    assert many[everything]["get"] <= 3 * 2000, "what each run and session is, once in the life of a process"


def _expect_all(usage: Told, count: int) -> None:
    rows = [row["event_info"] for row in usage["data"]]
    assert sum(row["type"] == "checkpoint" for row in rows) == count
    trained = [row for row in rows if row["type"] == "training"]
    assert len({row["training_run_id"] for row in trained}) == count
    assert {row["device_seconds"] for row in trained} == {10.0}, "nine of a pass, and one of a step"


def test_pages_are_what_a_list_that_reads_everything_would_tell() -> None:
    pages_of_ten, _ = lived(lambda: asked(10))

    def pages(part: str) -> Told:
        return next(answer for name, answer in pages_of_ten.items() if part in name)

    first = [run["training_run_id"] for run in pages("('offset', 2)")["training_runs"]]
    second = [run["training_run_id"] for run in pages("('offset', 5)")["training_runs"]]
    assert first[3:] == second[:2]
    assert len({*first, *second}) == 8
    assert pages("('offset', 5)")["cursor"] == {"offset": 5, "limit": 5, "total_count": 10}
    assert pages("checkpoints [('limit', 5)]")["cursor"] == {"offset": 0, "limit": 5, "total_count": 10}
    assert pages("jobs [")["cursor"] == {"offset": 0, "limit": 5, "total_count": 10}
    assert [job["state"] for job in pages("jobs [")["jobs"]] == ["completed"] * 5
    (saved,) = pages("/checkpoints []")["checkpoints"]
    assert saved["tinker_path"] == f"tinker://{run_of(9, 'local')}/sampler_weights/end"
