"""Lists and descriptions of jobs, from the records in the store."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from knapper import limits
from knapper.errors import NotFound, damaged
from knapper.ids import Tenant, TinkerPath
from knapper.jobs import activity, control, names, outputs
from knapper.jobs.activity import Activity, iso
from knapper.jobs.names import FINAL, Start
from knapper.jobs.presence import Present
from knapper.jobs.progress import Outline, ProgressReader, newest_step
from knapper.jobs.services import JobServices
from knapper.jobs.spec import RlJob, decode
from knapper.jobs.sweep import trials
from knapper.state import alarms, damage, layout, recent
from knapper.state.alarms import Alarms
from knapper.state.job_records import Evaluated, Refusal, Started, Trained, Waiting, read
from knapper.state.journal import envelope
from knapper.state.layout import ObjectKind
from knapper.state.recent import PageStart
from knapper.store import Store, many

_BILL_BYTES_MAX = 64 * 1024


@dataclass(frozen=True)
class JobListing:
    """A start that a look has found, whether it began or not."""

    start: Start
    at: float


async def listed(store: Store, tenant: Tenant) -> list[JobListing]:
    """The newest start of each job, newest first."""
    listings = damage.parsed(await store.list(ObjectKind.TENANT_JOB.under(tenant)), _listed)
    newest = {listing.start.job: listing for listing in listings}  # in order of time: the last one stays
    return sorted(newest.values(), key=lambda listing: listing.at, reverse=True)


async def listed_page(
    store: Store, tenant: Tenant, size: int, start: PageStart
) -> tuple[list[JobListing], PageStart | None]:
    """(the jobs of the newest starts from there on, where the page after them begins)"""
    page = await recent.page(store, ObjectKind.TENANT_JOB.under(tenant), size, start)
    found = damage.parsed(page.names, _listed)
    are_newest = await many.each(found, lambda listing: _is_newest(store, listing))
    return [listing for listing, is_newest in zip(found, are_newest, strict=True) if is_newest], page.older


async def _is_newest(store: Store, listing: JobListing) -> bool:
    """Whether the job was not started again since; always true of starts of earlier versions."""
    starts = await store.list(ObjectKind.TENANT_START.under(listing.start.tenant, listing.start.job))
    return not starts or ObjectKind.TENANT_START.parse(starts[-1])[-1] == listing.start.id


def _listed(key: str) -> JobListing:
    """Raises ValueError for a malformed key."""
    tenant, at_us, job, start = ObjectKind.TENANT_JOB.parse(key)
    return JobListing(Start(Tenant(tenant), job, start), int(at_us) / 1e6)


async def newest(store: Store, tenant: Tenant, job: str) -> JobListing:
    """Raises NotFound."""
    if starts := await store.list(ObjectKind.TENANT_START.under(tenant, names.job(job))):
        _, _, at_us, start = ObjectKind.TENANT_START.parse(starts[-1])
        return JobListing(Start(tenant, job, start), int(at_us) / 1e6)
    # Starts of earlier versions are in the tenant's list only.
    for listing in await listed(store, tenant):
        if listing.start.job == job:
            return listing
    raise NotFound(f"job {job!r} does not exist; `knapper jobs` lists those that do")


async def briefs(store: Store, chosen: list[JobListing]) -> list[dict[str, Any]]:
    """One line for each, in their order."""
    return await many.each(chosen, lambda listing: _line(store, listing))


async def whole(services: JobServices, tenant: Tenant, job: str, after: int, present: Present) -> dict[str, Any]:
    """Everything about one job; its metrics from the step after `after` on, a thousand at most. Raises NotFound.

    `present`: whether the functions' processes run.
    """
    listing = await newest(services.store, tenant, job)
    start, fields = listing.start, await _line(services.store, listing)
    if fields["sweep"]:
        return fields | await damage.unless(_sweep(services, start), {})
    trained = await damage.readable(
        range(after, min(fields["step"], after + limits.job_metrics_listed_max)),
        lambda step: read(services.store, start.trained(step), Trained),
    )
    lines = [(after + n, step) for n, step in enumerate(trained, 1) if step is not None]
    fields["metrics"] = [outputs.metrics_line(n, step) for n, step in lines]
    started = await damage.unless(read(services.store, start.started, Started), None)
    if started is None:
        return fields
    evaluations, job_spec = await outputs.evaluations(services.store, start), decode(started.spec_json)
    planned = fields["steps"] if fields["steps"] is not None else -1
    last = fields["step"] if fields["state"] == "completed" else planned
    fields |= {
        "base_model": started.base_model,
        "adapts": job_spec.lora.adapts,
        "run": start.run,
        "alarms": [alarms.shown(alarm) for alarm in await Alarms(services.store).newest(start.run)],
        "evaluation": outputs.evaluation(job_spec, evaluations, last) if evaluations else None,
        "outputs": layout.outputs(tenant, job),
        "job_yaml": started.job_yaml.decode(),
        **await damage.unless(_timing(services, start, started, evaluations, present), {}),
    }
    if fields["state"] == "completed":
        fields["checkpoint"] = str(TinkerPath(start.run, "sampler_weights", FINAL))
        fields["bill"] = await damage.unless(_bill(services, start), None)
    return fields


async def _sweep(services: JobServices, start: Start) -> dict[str, Any]:
    """What a sweep has in place of steps: its trials."""
    store = services.store
    started = await read(store, start.started, Started)
    assert started is not None, "its line has said so"
    job, now, tried = decode(started.spec_json), await control.now(store, start), await trials.read_all(store, start)
    ended, shown = now.state != "running", await trials.table(store, job, tried)
    fields: dict[str, Any] = {
        "metrics": [],
        "base_model": started.base_model,
        "started_at": iso(started.started_at),
        "ended_at": iso(now.at) if ended else None,
        "elapsed_seconds": round((now.at if ended else services.clock()) - started.started_at, 3),
        "activity": None, "seconds_left": None, "ends_at": None,
        "outputs": layout.outputs(start.tenant, start.job),
        "job_yaml": started.job_yaml.decode(),
        "trials": shown,
    }  # fmt: skip
    return fields | ({"checkpoint": shown["best"]["checkpoint"]} if now.state == "completed" else {})


async def _timing(
    services: JobServices, start: Start, started: Started, evaluated: Mapping[int, Evaluated], present: Present
) -> dict[str, Any]:
    """When the job started and ended, or its activity and when it may end, by this machine's clock."""
    store, clock = services.store, services.clock()
    control_now = await control.now(store, start)
    ended = control_now.state != "running"
    fields: dict[str, Any] = {
        "started_at": iso(started.started_at),
        "ended_at": iso(control_now.at) if ended else None,
        "elapsed_seconds": round((control_now.at if ended else clock) - started.started_at, 3),
        "activity": None, "seconds_left": None, "ends_at": None,
    }  # fmt: skip
    if ended:
        return fields
    job = decode(started.spec_json)
    outline = Outline(start, job, started.held_out)
    now = await ProgressReader(store).look(outline, job.steps if job.steps is not None else limits.job_steps_max)
    numbers = range(max(0, now.trained - activity.RECENT), now.trained)
    recent = [step for n in numbers if (step := await read(store, start.trained(n), Trained)) is not None]
    steps = recent[-1].steps if recent else job.steps
    done_at = [each.ended_at for each in recent] + [each.ended_at for each in evaluated.values()]
    moved_at = max([started.started_at, control_now.at, *done_at])
    if control_now.reason:  # it is stalled, for this reason
        current = Activity("waiting", control_now.at)
    else:
        current = await activity.activity(
            store, outline, now, steps or limits.job_steps_max, moved_at,
            lambda function: present(function, started.base_model),
        )  # fmt: skip
    spent_s = max(0.0, clock - current.since)
    fields["activity"] = {**current.told(), "seconds": round(spent_s, 3)}
    worked_s = 0.0 if current.phase in activity.IDLE else spent_s
    if steps is not None:
        steps = now.end(steps)
        left_s = activity.seconds_left(job, recent, evaluated, now.trained, steps, worked_s)
        if left_s is not None:
            fields |= {"seconds_left": round(left_s, 3), "ends_at": iso(clock + left_s)}
    return fields


async def _line(store: Store, listing: JobListing) -> dict[str, Any]:
    """The job's line; for a damaged record, one that says so."""
    try:
        return await _brief(store, listing)
    except damage.ERRORS as error:
        damage.report(error)
        return _blank(listing) | {"state": "unknown", "reason": str(error)}


async def _brief(store: Store, listing: JobListing) -> dict[str, Any]:
    start, fields = listing.start, _blank(listing)
    started = await read(store, start.started, Started)
    if started is None:
        return fields | await _unstarted(store, start)
    job, now = decode(started.spec_json), await control.now(store, start)
    fields |= {"kind": job.kind, "state": now.state, "reason": now.reason}
    if job.sweep is not None:
        tried = await trials.read_all(store, start)
        ended = sum(trial.ended is not None for trial in tried)
        return fields | {"step": ended, "steps": job.sweep.planned, "sweep": True}
    step = await newest_step(store, start)
    last = await damage.unless(read(store, start.trained(step - 1), Trained), None) if step else None
    steps = job.steps if isinstance(job, RlJob) or job.steps is not None else None if last is None else last.steps
    return fields | {"step": step, "steps": steps}


async def _bill(services: JobServices, start: Start) -> object:
    """Raises Corrupt: anyone may have overwritten a published file."""
    name = outputs.where(start, "bill.json")
    bill = await services.exchange.read(name, _BILL_BYTES_MAX)
    try:
        return None if bill is None else msgspec.json.decode(bill.data)
    except envelope.UNREADABLE as error:
        raise damaged(name, f"it is not JSON: {error}") from error


def _blank(listing: JobListing) -> dict[str, Any]:
    """The line of a job of which only its listing is known."""
    start = listing.start
    return {
        "job": start.job, "start": start.id, "kind": None, "state": "waiting", "reason": "", "step": 0, "steps": None,
        "sweep": False, "trial_of": names.sweep_of(start.job) or None,
        "created_at": datetime.fromtimestamp(listing.at, UTC).isoformat(),
    }  # fmt: skip


async def _unstarted(store: Store, start: Start) -> dict[str, Any]:
    refusals = await store.list(start.refusals)
    refused = await read(store, refusals[-1], Refusal) if refusals else None
    if refused is not None:
        return {"state": "refused", "reason": str(refused.report.get("error", "")), "error": refused.report}
    if await read(store, start.waiting, Waiting) is not None:
        return {"reason": "files that job.yaml names have not arrived yet"}
    return {}
