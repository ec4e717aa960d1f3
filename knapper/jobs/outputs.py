"""What a job publishes in the exchange while it runs; all of it is derived from the store, and can be republished."""

from typing import Any

import msgspec

from knapper import limits
from knapper.ids import Tenant
from knapper.jobs import activity, control, selection
from knapper.jobs.activity import Activity, iso
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Start
from knapper.jobs.progress import Outline, ProgressReader
from knapper.jobs.services import JobServices
from knapper.jobs.spec import AnyJob, decode
from knapper.jobs.sweep import trials
from knapper.state import damage, layout
from knapper.state.job_records import Control, Evaluated, Started, Trained, read
from knapper.state.layout import last_number
from knapper.store import Store
from knapper.store.cache import LruCache

_CACHED_MAX = 64


def where(start: Start, name: str) -> str:
    return f"{layout.outputs(start.tenant, start.job)}{name}"


def metrics_line(step: int, trained: Trained) -> dict[str, Any]:
    """`step`: counted from 1. `at`: when it was done. `wall_seconds`: since the previous one was done."""
    return {
        "step": step,
        "at": iso(trained.ended_at),
        **trained.metrics,
        "device_seconds": round(trained.device_s + trained.spent.sample_device_s, 4),
        "wall_seconds": round(trained.ended_at - (trained.before_at or trained.began_at), 4),
    }


class Metrics:
    """metrics.jsonl of running jobs; lines are cached, as they never change."""

    def __init__(self, services: JobServices) -> None:
        self._services = services
        self._lines: LruCache[Start, list[bytes]] = LruCache(_CACHED_MAX)

    async def publish(self, folder: Folder) -> None:
        if (lines := self._lines.known(folder.start)) is None:
            self._lines.keep(folder.start, lines := [])
        while (trained := await read(self._services.store, folder.start.trained(len(lines)), Trained)) is not None:
            lines.append(msgspec.json.encode(metrics_line(len(lines) + 1, trained)) + b"\n")
        await self._services.exchange.extend(where(folder.start, "metrics.jsonl"), b"".join(lines))

    def forget(self, folder: Folder) -> None:
        self._lines.forget(folder.start)


async def publish_rollouts(services: JobServices, folder: Folder, name: str, readable: bytes) -> None:
    if readable:
        await services.exchange.publish(where(folder.start, f"rollouts/{name}.jsonl"), readable)


async def evaluations(store: Store, start: Start) -> dict[int, Evaluated]:
    """By version, in order, without damaged records."""
    listed = await store.list(start.rounds("evaluations"))

    async def read_one(name: str) -> tuple[int, Evaluated]:
        evaluated = await read(store, name, Evaluated)
        assert evaluated is not None, "it was listed, and nobody deletes it"
        return last_number(name.removesuffix("/evaluated")), evaluated

    return dict(await damage.readable([name for name in listed if name.endswith("/evaluated")], read_one))


def evaluation(job: AnyJob, evaluations: dict[int, Evaluated], steps: int) -> dict[str, Any]:
    """Metrics before, after and at the steps between; the best step, where the job asks for one."""
    metrics_of = {version: evaluated.metrics for version, evaluated in evaluations.items()}
    between = [{"step": version, **metrics} for version, metrics in metrics_of.items() if 0 < version < steps]
    summary = {"before": metrics_of.get(0), "after": metrics_of.get(steps), "during": between}
    return summary | {"best": selection.described(job, evaluations)} if selection.selects(job) else summary


async def publish_evaluations(services: JobServices, folder: Folder, steps: int) -> None:
    summary = evaluation(folder.job, await evaluations(services.store, folder.start), steps)
    await publish_json(services, folder.start, "evaluation.json", summary)


async def publish_status(services: JobServices, started: Started) -> None:
    """Publish status.json, except for a replaced or deleted start."""
    start = Start(Tenant(started.tenant), started.job, started.start)
    now = await control.now(services.store, start)
    while not (now.state == "deleted" or (now.state == "cancelled" and now.reason.startswith(control.REPLACED))):
        await publish_json(services, start, "status.json", await _status(services, start, started, now))
        before, now = now, await control.now(services.store, start)
        if now == before:  # else a newer status may just have been overwritten
            return


async def _status(services: JobServices, start: Start, started: Started, now: Control) -> dict[str, Any]:
    job, at = decode(started.spec_json), services.clock()
    if job.sweep is not None:
        return await _status_of_sweep(services, start, started, now)
    steps, most = job.steps, job.steps if job.steps is not None else limits.job_steps_max
    outline = Outline(start, job, started.held_out)
    done = await ProgressReader(services.store).look(outline, most)
    if done.trained and (
        last := await damage.unless(read(services.store, start.trained(done.trained - 1), Trained), None)
    ):
        steps = last.steps
    current: Activity | None = None
    if now.state == "running" and now.reason:
        current = Activity("waiting", now.at)
    elif now.state == "running":
        current = await activity.activity(services.store, outline, done, steps or most, at, lambda _: None)
    return {
        "job": start.job, "start": start.id, "kind": job.kind, "state": now.state, "reason": now.reason,
        "step": done.trained, "steps": steps, "activity": current and current.told(), "at": iso(at),
        "base_model": started.base_model, "run": start.run, "adapts": job.lora.adapts,
    }  # fmt: skip


async def _status_of_sweep(services: JobServices, start: Start, started: Started, now: Control) -> dict[str, Any]:
    """`step` and `steps` count its trials: those that have ended, and all if that is known."""
    job = decode(started.spec_json)
    assert job.sweep is not None, "the caller has looked"
    tried = await trials.read_all(services.store, start)
    ended = sum(trial.ended is not None for trial in tried)
    return {
        "job": start.job, "start": start.id, "kind": job.kind, "state": now.state, "reason": now.reason,
        "step": ended, "steps": job.sweep.planned, "activity": None, "at": iso(services.clock()),
        "base_model": started.base_model, "sweep": True,
    }  # fmt: skip


async def publish_bill(services: JobServices, folder: Folder, bill: dict[str, Any]) -> None:
    await publish_json(services, folder.start, "bill.json", bill)


async def publish_json(services: JobServices, start: Start, name: str, value: dict[str, Any]) -> None:
    data = msgspec.json.format(msgspec.json.encode(value)) + b"\n"
    await services.exchange.publish(where(start, name), data)
