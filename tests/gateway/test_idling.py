"""What a gateway asks of the store while nothing happens: a handful of calls an hour, whatever is finished.

And what nobody told it of, it finds all the same.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from gateway import periodic, periodic_tasks
from gateway.periodic import PeriodicTask
from knapper import limits
from knapper.catalogue.served_models import Catalogue
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.exchange import Blob, Entries
from knapper.ids import LOCAL_TENANT, RunId
from knapper.jobs import inbox, revive
from knapper.jobs.notifications import Notifier
from knapper.jobs.services import JobServices
from knapper.state import layout
from knapper.state.journal.machine import Files, Outcome
from knapper.state.journal.records import Operation
from knapper.store.memory import MemoryStore
from tests.gateway.finished import lay_jobs, lay_runs
from tests.gateway.hours import HOUR_S, CountingStore, Gateway, clock, engine, gateway, lived
from tests.gateway.running import MODEL
from tests.jobs.services import Folder, serve
from tests.sim.ledger import LedgerMachine, LedgerState

DAY_S = 24 * HOUR_S
YAML = "kind: sft\ndata: d.jsonl\nsteps: 2\n"
FILES = {"job.yaml": YAML, "d.jsonl": '{"prompt": "a", "completion": "b"}\n'}


@dataclass
class Bucket(Folder):
    """An exchange in a bucket that tells nobody of uploads; its calls are counted beside the store's."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        self.calls["get", "inbox"] += 1
        return await super().read(name, bytes_max)

    async def list(self, prefix: str) -> Entries:
        self.calls["list", "inbox"] += 1
        return await super().list(prefix)


@dataclass
class House:
    """A gateway over a store that counts, and the doorbells it posts."""

    store: CountingStore
    bucket: Bucket
    job_services: JobServices
    doorbells: list[Event]
    gateway: Gateway

    async def hour(self) -> dict[str, int]:
        """Calls by verb, of the hour that begins now."""
        return await self.spent(HOUR_S)

    async def spent(self, seconds: float) -> dict[str, int]:
        self.store.calls.clear()
        self.bucket.calls.clear()
        await asyncio.sleep(seconds)
        return dict(Counter(self.store.verbs) + Counter(CountingStore(self.store, self.bucket.calls).verbs))


@asynccontextmanager
async def house(lay: Callable[[CountingStore], Awaitable[object]] | None = None) -> AsyncIterator[House]:
    store, bucket, doorbells = CountingStore(MemoryStore()), Bucket(), list[Event]()
    await serve(store)
    if lay is not None:
        await lay(store)

    async def hear(event: Event) -> None:
        doorbells.append(event)

    job_services = JobServices(store, bucket, Notifier(hear, clock), clock)
    async with gateway(store, job_services) as running:
        yield House(store, bucket, job_services, doorbells, running)


@pytest.mark.parametrize("count", [0, 10, 2000])
def test_an_idle_hour_costs_a_handful_of_calls_whatever_is_finished(count: int) -> None:
    async def lay(store: CountingStore) -> None:
        await lay_runs(store, clock, count)
        await lay_jobs(store, clock, count)

    async def story() -> None:
        async with house(lay) as idle:
            await asyncio.sleep(1.5 * DAY_S)  # what was laid is accounted for, and its weights without a name are gone
            usual = {"list": 4 + 1 + 12}  # jobs twice, the collector's marks; a bucket for uploads that tells nobody
            assert [await idle.hour() for _ in range(4)] == [usual] * 4
            day = await idle.spent(DAY_S)
            assert sum(day.values()) <= 24 * 17 + 20, "once, a look at everything"

    lived(story)


def test_a_silent_client_adds_a_handful() -> None:
    async def story() -> None:
        async with house() as idle:
            session = await idle.gateway.session()
            beating = asyncio.create_task(idle.gateway.live(session))
            await asyncio.sleep(3 * HOUR_S)
            hour = await idle.hour()
            assert not beating.done()
            assert hour["list"] <= 17
            assert hour["get"] <= 7, "whether the session has finished, every ten minutes; 360 heartbeats came"
            assert hour.get("put", 0) <= 1, "that it lived on this day"
            beating.cancel()

    lived(story)


def test_a_heartbeat_hears_at_once_that_its_session_has_finished() -> None:
    async def story() -> None:
        async with house() as idle:
            session = await idle.gateway.session()
            beat = {"session_id": session, "type": "session_heartbeat"}
            await idle.gateway.post("session_heartbeat", beat)
            await idle.gateway.post(f"sessions/{session}/finish", {"reason": {"type": "success"}})
            assert (await idle.gateway.http.post("session_heartbeat", json=beat)).status_code == 410

    lived(story)


def test_a_job_that_waits_is_rung_for_again_and_again_and_ever_less_often() -> None:
    async def story() -> None:
        async with house() as idle:
            await idle.gateway.post("jobs", {"name": "j", "files": FILES})
            assert [event.type for event in idle.doorbells] == [cloudevents.JOB_STARTED]
            began, at = asyncio.get_running_loop().time(), list[float]()
            while len(at) < 8:
                await asyncio.sleep(1.0)
                while len(at) < len(idle.doorbells) - 1:
                    at.append(asyncio.get_running_loop().time() - began)
            assert at[0] <= 60 + 15 + 1, "KNAPPER_JOB_STALLED_S, and the pace of looking"
            assert max(after - before for before, after in itertools.pairwise(at)) <= 601
            hour = await idle.hour()
            assert sum(hour.values()) <= 12 + 6 * 8, "six checks of the job, and six doorbells"

    lived(story)


def test_a_run_that_waits_for_an_operation_is_looked_at_ever_less_often() -> None:
    async def story() -> None:
        store = CountingStore(MemoryStore())
        await Catalogue(store).publish(MODEL)
        async with engine(store.store, LedgerMachine()) as url, gateway(store, train_step_url=url) as running:
            session = await running.session()
            run = await running.run(session)
            assert (await running.result(run, 0))["type"] == "create_model"
            await running.step(run, 2)
            store.calls.clear()
            await asyncio.sleep(limits.sequence_gap_s)
            assert await store.get(layout.operation(RunId(run), 1)) is None
            assert store.verbs["list"] <= 34, store.calls
            await asyncio.sleep(61)
            assert "never arrived" in (await running.result(run, 1))["error"]
            assert await running.result(run, 2) == {"step": 1}
            store.calls.clear()
            await asyncio.sleep(5 * 60)
            # A look of the collector, as the session is silent by now, and at most one of the accounts: whether the
            # first operation rang for those before or after they began to pause at second 0 moves their looks.
            accounts = sum(count for (_, what), count in store.calls.items() if what in ("used", "using", "runs/used"))
            assert sum(store.calls.values()) - accounts <= 15, store.calls
            assert accounts <= 9, store.calls
            assert not store.calls.keys() & {("get", "runs/in"), ("put", "runs/out")}, "it rests"

    lived(story)


def test_polls_look_at_nothing_while_the_holder_tells_of_what_it_commits() -> None:
    class Slow(LedgerMachine):
        async def apply(self, state: LedgerState, operation: Operation, source: Files | None) -> Outcome[LedgerState]:
            await asyncio.sleep(100.0)
            return await super().apply(state, operation, source)

    async def story() -> None:
        store = CountingStore(MemoryStore())
        await Catalogue(store).publish(MODEL)
        async with engine(store.store, Slow()) as url, gateway(store, train_step_url=url) as running:
            run = await running.run(await running.session())
            await running.result(run, 0)
            for seq in (1, 2, 3):
                await running.step(run, seq)
            store.calls.clear()
            began = asyncio.get_running_loop().time()
            await asyncio.gather(*(running.result(run, seq) for seq in (1, 2, 3)))
            took_s = asyncio.get_running_loop().time() - began
            assert took_s == pytest.approx(300.0, abs=2.0)
            assert store.calls["list", "runs/out"] <= 1 + took_s / 20.0, "for what should have been told and was not"
            assert store.calls["list", "runs/in"] <= 1, "no check for gaps while an operation is at work"

    lived(story)


def test_a_lone_run_lists_nothing_for_its_operations() -> None:
    """Four calls that create a step, and no listing, on either side."""

    async def story() -> None:
        gateways, engines = CountingStore(MemoryStore()), CountingStore(MemoryStore())
        engines.store = gateways.store
        await Catalogue(gateways).publish(MODEL)
        async with engine(engines, LedgerMachine()) as url, gateway(gateways, train_step_url=url) as running:
            run = await running.run(await running.session())
            await running.result(run, 0)
            for seq in range(1, 3):  # the first looks of both
                await running.step(run, seq)
                await running.result(run, seq)
            for store in (gateways, engines):
                store.calls.clear()
            for seq in range(3, 23):
                await running.step(run, seq)
                await running.result(run, seq)
            assert gateways.calls == {("put", "runs/in"): 20}
            assert "list" not in engines.verbs
            assert engines.calls["put", "runs/out"] == 20
            assert engines.calls["get", "runs/in"] == 80, "each, and three times whether there is another"

    lived(story)


# ---- what nobody told of


def test_a_job_that_another_process_started_and_lost_the_bell_of_is_found() -> None:
    async def story() -> None:
        async with house() as idle:
            await asyncio.sleep(DAY_S)
            idle.bucket.put("j", FILES)
            other = JobServices(idle.store, idle.bucket, idle.job_services.notifier, clock)
            assert await inbox.look(other, LOCAL_TENANT, "j") is not None  # it dies before it rings, and tells nobody
            await asyncio.sleep(periodic_tasks.IDLE_S + 2 * 60 + 4 * 15)
            assert {event.type for event in idle.doorbells} == {cloudevents.JOB_STARTED}

    lived(story)


def test_uploads_that_nobody_tells_of_are_found_within_five_minutes() -> None:
    async def story() -> None:
        async with house() as idle:
            await asyncio.sleep(DAY_S)
            idle.bucket.put("j", FILES)
            await asyncio.sleep(limits.job_inbox_look_s + 1)
            assert {event.type for event in idle.doorbells} == {cloudevents.JOB_STARTED}

    lived(story)


def test_a_corrected_job_yaml_leaves_nothing_that_is_looked_at_for_ever() -> None:
    async def story() -> None:
        async with house() as idle:
            await idle.gateway.post(
                "jobs", {"name": "j", "files": {"job.yaml": YAML.replace("d.jsonl", "missing.jsonl")}}
            )
            assert len(await idle.store.list("expected/")) == 1
            await asyncio.sleep(60)
            idle.bucket.put("j", {"job.yaml": "kind: nonsense\n"})
            await asyncio.sleep(HOUR_S)
            assert await idle.store.list("expected/") == []
            report = idle.bucket.files["inbox/local/j/job.error.json"]
            assert b"nonsense" in report
            await asyncio.sleep(DAY_S)
            assert await idle.hour() == {"list": 17}

    lived(story)


def test_what_is_refused_is_not_looked_at_again_until_something_comes() -> None:
    """All files are there at last, and one of them is wrong."""

    async def story() -> None:
        async with house() as idle:
            idle.bucket.put("j", {"job.yaml": YAML})
            await inbox.look(idle.job_services, LOCAL_TENANT, "j")
            assert len(await idle.store.list("expected/")) == 1
            idle.bucket.put("j", {"d.jsonl": "{}\n"})
            await inbox.look(idle.job_services, LOCAL_TENANT, "j")
            assert b"d.jsonl" in idle.bucket.files["inbox/local/j/job.error.json"]
            assert await idle.store.list("expected/") == []
            assert await revive.due(idle.job_services, revive.Seen()) == []

    lived(story)


# ---- how periodic tasks idle


def test_a_task_that_finds_nothing_pauses_ever_longer_and_is_back_once_its_doorbell_rings() -> None:
    async def story() -> list[float]:
        loop, at = asyncio.get_running_loop(), list[float]()

        async def work() -> float:
            at.append(loop.time())
            return 100.0

        task = PeriodicTask("c", work, 10.0)
        async with periodic.running([task]):
            await asyncio.sleep(400)
            task.doorbell.set()  # at 400, in the middle of a pause that began at 350
            await asyncio.sleep(31)
        return at

    assert lived(story) == [10, 30, 70, 150, 250, 350, 410, 430]


def test_a_doorbell_during_the_work_counts_for_the_next_run() -> None:
    async def story() -> list[float]:
        loop, at = asyncio.get_running_loop(), list[float]()

        async def work() -> float:
            at.append(loop.time())
            if len(at) == 3:
                task.doorbell.set()  # it has looked already
            return 1000.0

        task = PeriodicTask("c", work, 10.0)
        async with periodic.running([task]):
            await asyncio.sleep(101)
        return at

    assert lived(story) == [10, 30, 70, 80, 100]
