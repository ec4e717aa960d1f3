"""Reports for administrators of a tenant: its audit log, quota, usage and storage, with costs if there are prices."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.rest import responses
from gateway.services import Services, services_of
from gateway.tenants import tenant_of
from knapper.errors import InvalidField, NotFound
from knapper.ids import RunId, Tenant, session_of
from knapper.jobs import job_names
from knapper.state import damage, usage
from knapper.state.audit import Entry
from knapper.state.checkpoint_index import CheckpointEntry
from knapper.state.ledger import Use
from knapper.state.prices import Prices
from knapper.state.usage import Window
from knapper.store import many
from knapper.wire import json, rest

_RESOURCES = {"all": "", "checkpoints": "checkpoint", "projects": "project", "teams": "team"}
_RESOURCES["organizations"] = "organization"


@dataclass(frozen=True)
class _Row:
    """`cost`: in the currency of the prices. `rate`: the price of a million tokens; None if they are not all of it."""

    hour: int
    tokens: int
    session: str  # empty for none
    base_model: str
    info: dict[str, Any]
    cost: float = 0.0
    rate: float | None = None


async def quota(request: Request) -> Response:
    """The tenant's quota, and what it has used of it."""
    gateway, tenant = services_of(request), tenant_of(request)
    return JSONResponse({"tenant": tenant, **await gateway.admission.report(tenant)})


async def audit(request: Request) -> Response:
    """The entries of one UTC day, by default today."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), rest.AuditQuery)
    try:
        day = datetime.fromisoformat(query.day) if query.day else datetime.fromtimestamp(gateway.clock(), UTC)
    except ValueError as error:
        raise InvalidField("day", query.day, "a day as YYYY-MM-DD") from error
    entries = await gateway.audit.day(tenant, day, _RESOURCES[query.event_type])
    return JSONResponse({"entries": [_entry(tenant, entry) for entry in entries]})


def _entry(tenant: Tenant, entry: Entry) -> dict[str, Any]:
    about = {name: entry.details.get(name) for name in ("model_id", "tinker_path", "purpose")}
    details = {"actor": tenant, **entry.details}
    return {"timestamp": responses.time(entry.at), "event": entry.event, "event_details": details, **about}


async def usage_events(request: Request) -> Response:
    """Tokens trained and checkpoints saved, per hour and run, and tokens sampled, per hour and session.

    Beyond the protocol's fields, training rows name the run, and training and sampling rows have device seconds, the
    GPU time to pay for; a sample's include those of its prompt. `cost` is in the currency of the prices, null without
    any; the SDK's own fields have it if that is the US dollar.
    """
    gateway, tenant = services_of(request), tenant_of(request)
    window = Window(*json.convert(responses.query(request), rest.UsageQuery).hours(gateway.clock()))
    data, cost = await used(gateway, tenant, window)
    sessions, jobs = {}, {}
    for session in {event["session_id"] for event in data} - {None}:
        record = await damage.unless(gateway.lookups.session(session, tenant), None)
        if record is not None:
            sessions[session] = {"user_metadata": responses.labels(record.user_metadata_json)}
            jobs[session] = job_names.of(record)
    for event in data:
        event["job"] = jobs.get(event["session_id"]) or None
    prices = gateway.prices
    total = {"currency": prices.currency, "total_cost": cost} if prices.any else {}
    return JSONResponse({"data": data, "sessions": sessions, "cost_data_through": None, **total})


async def used(gateway: Services, tenant: Tenant, window: Window) -> tuple[list[dict[str, Any]], float]:
    """The tenant's usage, an event for each hour, and run or session, and its cost by the server's prices.

    Raises InvalidField for too much of it.
    """
    rows = [*await _training_rows(gateway, tenant, window), *await _sampling_rows(gateway, tenant, window)]
    await many.each({row.session for row in rows if row.session}, lambda session: _project(gateway, tenant, session))
    in_order = sorted(rows, key=lambda row: (row.hour, -row.tokens))
    return [await _event(gateway, tenant, row) for row in in_order], sum(row.cost for row in rows)


async def _training_rows(gateway: Services, tenant: Tenant, window: Window) -> list[_Row]:
    """Tokens trained, then checkpoints saved."""
    saved = usage.checkpoints_saved(await gateway.checkpoints.labels(tenant), window)
    trained = await _trained(gateway, tenant, window)
    await many.each({run for _, run in trained} | {run for _, run in saved}, lambda run: _model(gateway, tenant, run))
    rows = []
    for (hour, run), (tokens, device_s) in trained.items():
        info = {"type": "training", "training_run_id": run, "device_seconds": round(device_s, 3)}
        if tokens or device_s:
            cost = gateway.prices.cost(trained=tokens, device_s=device_s)
            model, rate = await _model(gateway, tenant, run), _rate(gateway.prices, gateway.prices.trained)
            rows.append(_Row(hour, tokens, session_of(run), model, info, cost, rate))
    for (hour, run), count in saved.items():
        model, info = await _model(gateway, tenant, run), {"type": "checkpoint", "count": count}
        rows.append(_Row(hour, 0, session_of(run), model, info))
    return rows


async def _sampling_rows(gateway: Services, tenant: Tenant, window: Window) -> list[_Row]:
    rows, prices = [], gateway.prices
    for hour, sampled in await usage.tokens_sampled(gateway.store, tenant, window):
        prefill = {"type": "sampling_prefill", "cached": False}  # several samples of one prompt count it once
        cost = prices.cost(prefilled=sampled.prompt)
        rows.append(_Row(hour, sampled.prompt, sampled.session, sampled.base_model, prefill, cost, prices.prefilled))
        sample = {"type": "sampling_sample", "device_seconds": round(sampled.device_s, 3)}
        cost, rate = prices.cost(sampled=sampled.sampled, device_s=sampled.device_s), _rate(prices, prices.sampled)
        rows.append(_Row(hour, sampled.sampled, sampled.session, sampled.base_model, sample, cost, rate))
    return rows


def _rate(prices: Prices, price: float) -> float | None:
    return None if prices.device_second else price


async def _trained(gateway: Services, tenant: Tenant, window: Window) -> Use:
    """From the ledger; until it exists, from the journals of all runs."""
    if await gateway.accounts.begun():
        return await gateway.accounts.used(tenant, window)
    runs = await gateway.tenant_index.runs(tenant)
    tokens = await usage.tokens_trained(gateway.store, runs, window)
    device_s = await usage.device_seconds(gateway.store, runs, window)
    return {key: (tokens.get(key, 0), device_s.get(key, 0.0)) for key in tokens.keys() | device_s.keys()}


async def _model(gateway: Services, tenant: Tenant, run: RunId) -> str:
    """The run's base model, empty if its record is gone or damaged; its usage counts all the same."""
    try:
        spec = await damage.unless(gateway.lookups.spec(run, tenant), None)
    except NotFound:
        return ""
    return "" if spec is None else spec.base_model


async def _project(gateway: Services, tenant: Tenant, session: str) -> str:
    """The session's project, empty for none or if its record is damaged."""
    return await damage.unless(gateway.lookups.project(session, tenant), "")


async def _event(gateway: Services, tenant: Tenant, row: _Row) -> dict[str, Any]:
    counted = {} if row.info["type"] == "checkpoint" else {"token_count": row.tokens}
    return {
        "bucket_start": usage.begin_of(row.hour).isoformat(),
        "bucket_end": usage.begin_of(row.hour + 1).isoformat(),
        "base_model": row.base_model,
        "user_id": tenant,
        "session_id": row.session or None,
        "project_id": (await _project(gateway, tenant, row.session) or None) if row.session else None,
        "event_info": row.info | counted,
        **(_cost(gateway.prices, row) if counted and gateway.prices.any else {"cost": None}),
    }


def _cost(prices: Prices, row: _Row) -> dict[str, Any]:
    if prices.currency != "USD":
        return {"cost": row.cost}
    return {
        "cost": row.cost,
        "estimated_cost_usd": row.cost,
        "effective_rate_usd_per_million_tokens": row.rate,
    }


async def storage(request: Request) -> Response:
    """Existing checkpoints by project. Files that several checkpoints share count once per project."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), rest.StorageQuery)
    labels = await gateway.checkpoints.labels(tenant)
    sessions = list(dict.fromkeys(session_of(label.path.run) for label in labels))
    names = await many.each(sessions, lambda session: _project(gateway, tenant, session))
    project_of = dict(zip(sessions, names, strict=True))
    projects: dict[str, list[CheckpointEntry]] = {}
    for label in labels:
        projects.setdefault(project_of[session_of(label.path.run)], []).append(label)
    data = []
    for project, entries in sorted(projects.items()):
        if query.project_id in (None, project):
            size = usage.stored_bytes(entries)
            row = {"project_id": project or None, "org_user_urn": tenant, "checkpoint_count": len(entries)}
            data.append({**row, "size_bytes": size, "size_gigabytes": size / 1e9, **_a_month(gateway.prices, size)})
    prices = gateway.prices
    in_dollars = prices.stored > 0 and prices.currency == "USD"
    rate = prices.a_month(10**9) if in_dollars else None
    return JSONResponse({"data": data, "effective_rate_usd_per_gigabyte_month": rate})


def _a_month(prices: Prices, size: int) -> dict[str, Any]:
    if not prices.stored:
        return {}
    cost = {"currency": prices.currency, "monthly_cost": prices.a_month(size)}
    return cost | ({"estimated_monthly_cost_usd": cost["monthly_cost"]} if prices.currency == "USD" else {})
