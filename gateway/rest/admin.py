"""What administrators look at: the audit log, and usage. Of the tenant that asks; prices are not ours to know."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.rest import responses
from gateway.services import Services, parts
from gateway.tenants import tenant_of
from knapper.errors import InvalidField, NotFound
from knapper.ids import RunId, Tenant, session_of
from knapper.jobs import job_names
from knapper.state import damage, usage
from knapper.state.audit import Entry
from knapper.state.checkpoint_index import CheckpointEntry
from knapper.state.ledger import Use
from knapper.state.usage import Window
from knapper.store import many
from knapper.wire import json, rest

_RESOURCES = {"all": "", "checkpoints": "checkpoint", "projects": "project", "teams": "team"}
_RESOURCES["organizations"] = "organization"


async def audit(request: Request) -> Response:
    """One UTC day, today if none is named."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.convert(responses.query(request), rest.AuditQuery)
    try:
        day = datetime.fromisoformat(asked.day) if asked.day else datetime.fromtimestamp(gateway.clock(), UTC)
    except ValueError as error:
        raise InvalidField("day", asked.day, "a day as YYYY-MM-DD") from error
    entries = await gateway.audit.day(tenant, day, _RESOURCES[asked.event_type])
    return JSONResponse({"entries": [_entry(tenant, entry) for entry in entries]})


def _entry(tenant: Tenant, entry: Entry) -> dict[str, Any]:
    about = {name: entry.details.get(name) for name in ("model_id", "tinker_path", "purpose")}
    details = {"actor": tenant, **entry.details}
    return {"timestamp": responses.time(entry.at), "event": entry.event, "event_details": details, **about}


async def usage_events(request: Request) -> Response:
    """Tokens trained and checkpoints saved, for each hour and run, and tokens sampled, for each hour and session.

    Beside the protocol's fields, training says which run, and both say the seconds that they had of the device: what a
    GPU is paid for. Those of prompts are among those of their samples. No cost is estimated: there is no price list.
    """
    gateway, tenant = parts(request), tenant_of(request)
    window = Window(*json.convert(responses.query(request), rest.UsageQuery).hours(gateway.clock()))
    saved = usage.checkpoints_saved(await gateway.checkpoints.labels(tenant), window)
    rows = []
    used = await _trained(gateway, tenant, window)
    await many.each({run for _, run in used} | {run for _, run in saved}, lambda run: _model(gateway, tenant, run))
    for (hour, run), (tokens, device_s) in used.items():
        told = {"type": "training", "training_run_id": run, "device_seconds": round(device_s, 3)}
        if tokens or device_s:
            rows.append(_Row(hour, tokens, session_of(run), await _model(gateway, tenant, run), told))
    for (hour, run), count in saved.items():
        model, told = await _model(gateway, tenant, run), {"type": "checkpoint", "count": count}
        rows.append(_Row(hour, 0, session_of(run), model, told))
    for hour, each in await usage.tokens_sampled(gateway.store, tenant, window):
        prefill = {"type": "sampling_prefill", "cached": False}  # a prompt that several samples share counts once
        rows.append(_Row(hour, each.prompt, each.session, each.base_model, prefill))
        drawn = {"type": "sampling_sample", "device_seconds": round(each.device_s, 3)}
        rows.append(_Row(hour, each.sampled, each.session, each.base_model, drawn))
    await many.each({row.session for row in rows if row.session}, lambda each: _project(gateway, tenant, each))
    data = [await _event(gateway, tenant, row) for row in sorted(rows, key=lambda row: (row.hour, -row.tokens))]
    sessions = {}
    jobs = {}
    for session in {event["session_id"] for event in data} - {None}:
        record = await damage.unless(gateway.records.session(session, tenant), None)
        if record is not None:
            sessions[session] = {"user_metadata": responses.labels(record.user_metadata_json)}
            jobs[session] = job_names.of(record)
    for event in data:
        event["job"] = jobs.get(event["session_id"]) or None
    return JSONResponse({"data": data, "sessions": sessions, "cost_data_through": None})


async def _trained(gateway: Services, tenant: Tenant, window: Window) -> Use:
    """From accounts; until there are any, from the journals of all runs."""
    if await gateway.accounts.begun():
        return await gateway.accounts.used(tenant, window)
    runs = await gateway.register.runs(tenant)
    tokens = await usage.tokens_trained(gateway.store, runs, window)
    device_s = await usage.device_seconds(gateway.store, runs, window)
    return {key: (tokens.get(key, 0), device_s.get(key, 0.0)) for key in tokens.keys() | device_s.keys()}


@dataclass(frozen=True)
class _Row:
    hour: int
    tokens: int
    session: str  # empty: none
    base_model: str
    told: dict[str, Any]


async def _model(gateway: Services, tenant: Tenant, run: RunId) -> str:
    """Empty for a run that is gone, or damaged; what it used is not."""
    try:
        spec = await damage.unless(gateway.records.spec(run, tenant), None)
    except NotFound:
        return ""
    return "" if spec is None else spec.base_model


async def _project(gateway: Services, tenant: Tenant, session: str) -> str:
    """Empty for none, and for one that a damaged record hides."""
    return await damage.unless(gateway.records.project(session, tenant), "")


async def _event(gateway: Services, tenant: Tenant, row: _Row) -> dict[str, Any]:
    counted = {} if row.told["type"] == "checkpoint" else {"token_count": row.tokens}
    return {
        "bucket_start": usage.begin_of(row.hour).isoformat(),
        "bucket_end": usage.begin_of(row.hour + 1).isoformat(),
        "base_model": row.base_model,
        "user_id": tenant,
        "session_id": row.session or None,
        "project_id": (await _project(gateway, tenant, row.session) or None) if row.session else None,
        "event_info": row.told | counted,
    }


async def storage(request: Request) -> Response:
    """Checkpoints that live, by project. Files that several share count once in each project."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.convert(responses.query(request), rest.StorageQuery)
    living = await gateway.checkpoints.labels(tenant)
    sessions = list(dict.fromkeys(session_of(label.path.run) for label in living))
    found = dict(zip(sessions, await many.each(sessions, lambda each: _project(gateway, tenant, each)), strict=True))
    projects: dict[str, list[CheckpointEntry]] = {}
    for label in living:
        projects.setdefault(found[session_of(label.path.run)], []).append(label)
    data = []
    for project, labels in sorted(projects.items()):
        if asked.project_id in (None, project):
            size = usage.stored_bytes(labels)
            row = {"project_id": project or None, "org_user_urn": tenant, "checkpoint_count": len(labels)}
            data.append({**row, "size_bytes": size, "size_gigabytes": size / 1e9})
    return JSONResponse({"data": data, "effective_rate_usd_per_gigabyte_month": None})
