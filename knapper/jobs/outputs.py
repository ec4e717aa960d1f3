"""What people see of a job while it runs, in the exchange: all of it derived from the store, and published again."""

from typing import Any

import msgspec

from knapper import limits
from knapper.ids import Tenant
from knapper.jobs import activity, control
from knapper.jobs.activity import Activity, iso
from knapper.jobs.job_files import Folder
from knapper.jobs.names import Start
from knapper.jobs.progress import Outline, ProgressReader
from knapper.jobs.services import JobServices
from knapper.jobs.spec import decode
from knapper.state import damage, layout
from knapper.state.job_records import Control, Evaluated, Started, Trained, read
from knapper.state.layout import last_number
from knapper.store import Store
from knapper.store.cache import LruCache

_KEPT_MAX = 64


def where(start: Start, name: str) -> str:
    return f"{layout.outputs(start.tenant, start.job)}{name}"


def metrics_line(step: int, trained: Trained) -> dict[str, Any]:
    """`step`: counted from 1. `at`: when it was done. `wall_seconds`: since what came before it in the run was."""
    return {
        "step": step,
        "at": iso(trained.ended_at),
        **trained.metrics,
        "device_seconds": round(trained.device_s + trained.spent.sample_device_s, 4),
        "wall_seconds": round(trained.ended_at - (trained.before_at or trained.began_at), 4),
    }


class Metrics:
    """metrics.jsonl of jobs under way; what was read of them is kept, as it never changes."""

    def __init__(self, place: JobServices) -> None:
        self._place = place
        self._lines: LruCache[Start, list[bytes]] = LruCache(_KEPT_MAX)

    async def publish(self, folder: Folder) -> None:
        if (lines := self._lines.known(folder.start)) is None:
            self._lines.keep(folder.start, lines := [])
        while (trained := await read(self._place.store, folder.start.trained(len(lines)), Trained)) is not None:
            lines.append(msgspec.json.encode(metrics_line(len(lines) + 1, trained)) + b"\n")
        await self._place.exchange.extend(where(folder.start, "metrics.jsonl"), b"".join(lines))

    def forget(self, folder: Folder) -> None:
        self._lines.forget(folder.start)


async def publish_rollouts(place: JobServices, folder: Folder, name: str, readable: bytes) -> None:
    if readable:
        await place.exchange.publish(where(folder.start, f"rollouts/{name}.jsonl"), readable)


async def evaluations(store: Store, start: Start) -> dict[int, Evaluated]:
    """By version, in order; without damaged ones."""
    listed = await store.list(start.rounds("evaluations"))

    async def one(name: str) -> tuple[int, Evaluated]:
        evaluated = await read(store, name, Evaluated)
        assert evaluated is not None, "it was listed, and nobody deletes it"
        return last_number(name.removesuffix("/evaluated")), evaluated

    return dict(await damage.readable([name for name in listed if name.endswith("/evaluated")], one))


def evaluation(found: dict[int, Evaluated], steps: int) -> dict[str, Any]:
    """Before, after, and at the steps between."""
    told = {version: each.metrics for version, each in found.items()}
    between = [{"step": version, **metrics} for version, metrics in told.items() if 0 < version < steps]
    return {"before": told.get(0), "after": told.get(steps), "during": between}


async def publish_evaluations(place: JobServices, folder: Folder, steps: int) -> None:
    found = evaluation(await evaluations(place.store, folder.start), steps)
    await _publish_json(place, folder.start, "evaluation.json", found)


async def publish_status(place: JobServices, started: Started) -> None:
    """status.json; of a start that another took the place of, or that is deleted, nothing."""
    start = Start(Tenant(started.tenant), started.job, started.start)
    now = await control.now(place.store, start)
    while not (now.state == "deleted" or (now.state == "cancelled" and now.reason.startswith(control.REPLACED))):
        await _publish_json(place, start, "status.json", await _status(place, start, started, now))
        before, now = now, await control.now(place.store, start)
        if now == before:  # else somebody's newer status may just have been written over
            return


async def _status(place: JobServices, start: Start, started: Started, now: Control) -> dict[str, Any]:
    job, at = decode(started.spec_json), place.clock()
    steps, most = job.steps, job.steps if job.steps is not None else limits.job_steps_max
    outline = Outline(start, job, started.held_out)
    there = await ProgressReader(place.store).look(outline, most)
    if there.trained and (
        last := await damage.unless(read(place.store, start.trained(there.trained - 1), Trained), None)
    ):
        steps = last.steps
    doing: Activity | None = None
    if now.state == "running" and now.reason:
        doing = Activity("waiting", now.at)
    elif now.state == "running":
        doing = await activity.activity(place.store, outline, there, steps or most, at, lambda _: None)
    return {
        "job": start.job, "start": start.id, "kind": job.kind, "state": now.state, "reason": now.reason,
        "step": there.trained, "steps": steps, "activity": doing and doing.told(), "at": iso(at),
        "base_model": started.base_model, "run": start.run, "adapts": job.lora.adapts,
    }  # fmt: skip


async def publish_bill(place: JobServices, folder: Folder, bill: dict[str, Any]) -> None:
    await _publish_json(place, folder.start, "bill.json", bill)


async def _publish_json(place: JobServices, start: Start, name: str, value: dict[str, Any]) -> None:
    data = msgspec.json.format(msgspec.json.encode(value)) + b"\n"
    await place.exchange.publish(where(start, name), data)
