"""Training runs: list, show, delete, and list their checkpoints."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.rest import responses
from gateway.services import Services, services_of
from gateway.tenants import tenant_of
from knapper import ids
from knapper.errors import NotFound
from knapper.ids import CheckpointKind, RunId, SessionId, Tenant, TinkerPath, session_of
from knapper.jobs import job_names
from knapper.state import damage
from knapper.state.journal import ends
from knapper.state.journal.records import Spec
from knapper.wire import json, rest

_SHOWN: tuple[CheckpointKind, ...] = ("weights", "sampler_weights")


async def list_runs(request: Request) -> Response:
    """Newest session first, and within a session the newest run first."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), rest.RunsPage)
    runs = await gateway.tenant_index.runs(tenant)
    if query.project_id is not None:
        runs = await _in_project(gateway, tenant, runs, query.project_id)
    page = runs[query.offset : query.offset + query.limit]

    cursor = responses.cursor(query.offset, query.limit, len(runs))
    return JSONResponse({"training_runs": await described(gateway, tenant, page), "cursor": cursor})


async def described(gateway: Services, tenant: Tenant, runs: list[RunId]) -> list[dict[str, Any]]:
    """The runs as clients see them, in their order, without those that are gone or damaged."""

    async def describe(run: RunId) -> dict[str, Any] | None:
        try:
            spec = await gateway.lookups.spec(run, tenant)
        except NotFound:  # the gateway that registered it died before creating it
            return None
        return await description(gateway, spec)

    return [run for run in await damage.readable(runs, describe) if run is not None]


async def get_run(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    json.convert(responses.query(request), rest.Access)
    spec = await gateway.lookups.spec(request.path_params["run_id"], tenant)
    return JSONResponse(await description(gateway, spec))


async def delete_run(request: Request) -> Response:
    """Delete the run and its checkpoints at once and for good. Files that other records refer to stay for these.

    Idempotent, since the first response may have been lost.
    """
    gateway, tenant = services_of(request), tenant_of(request)
    await erase(gateway, tenant, ids.run_id(request.path_params["run_id"]))
    return JSONResponse({"status": "ok"})


async def erase(gateway: Services, tenant: Tenant, run: RunId) -> None:
    """Raises NotFound."""
    end = await ends.ended(gateway.store, run)
    if end is None or end.tenant != tenant or end.reason != "deleted":
        await gateway.lookups.spec(run, tenant)
        await gateway.audit.write(tenant, "training_run_delete", model_id=run)
    await gateway.collector.delete(run, tenant)
    gateway.lookups.forget_run(run)
    gateway.lookups.forget_samplers()
    await gateway.train_client.forget(run)
    gateway.wakeups.collect.set()


async def list_checkpoints(request: Request) -> Response:
    """The run's checkpoints, newest first."""
    gateway, tenant = services_of(request), tenant_of(request)
    spec = await gateway.lookups.spec(request.path_params["run_id"], tenant)
    checkpoints = await gateway.checkpoints.listed(tenant, within=f"{spec.run}/")
    return JSONResponse(
        {"checkpoints": [responses.checkpoint(checkpoint) for checkpoint in checkpoints], "cursor": None}
    )


async def description(gateway: Services, spec: Spec) -> dict[str, Any]:
    """One run as clients see it."""
    labels = await gateway.checkpoints.labels(Tenant(spec.tenant), within=f"{spec.run}/")
    newest = {label.path.kind: label for label in reversed(labels)}
    checkpoints = await gateway.checkpoints.read(label for kind in _SHOWN if (label := newest.get(kind)) is not None)
    shown = {TinkerPath.parse(checkpoint.path).kind: responses.checkpoint(checkpoint) for checkpoint in checkpoints}
    name = await _name(gateway, spec)
    metadata = responses.labels(spec.user_metadata_json)
    return {
        "training_run_id": spec.run,
        **({"name": name} if name else {}),
        "base_model": spec.base_model,
        "model_owner": spec.tenant,
        "is_lora": True,
        "lora_rank": spec.rank,
        "last_request_time": responses.time(await gateway.lookups.last_request_at(RunId(spec.run))),
        "last_checkpoint": shown.get("weights"),
        "last_sampler_checkpoint": shown.get("sampler_weights"),
        "alarms": await gateway.monitor.alarms.count(RunId(spec.run)),
        "user_metadata": {"job": name} if name else metadata,  # SDKs have no field for a name
    }


async def _name(gateway: Services, spec: Spec) -> str:
    """The name of the run's job, empty if it has none."""
    return job_names.of(
        await damage.unless(gateway.lookups.session(session_of(RunId(spec.run)), Tenant(spec.tenant)), None)
    )


async def _in_project(gateway: Services, tenant: Tenant, runs: list[RunId], project: str) -> list[RunId]:
    sessions = list(dict.fromkeys(session_of(run) for run in runs))

    async def project_of(session: SessionId) -> tuple[SessionId, str]:
        return session, await gateway.lookups.project(session, tenant)

    wanted = {session for session, name in await damage.readable(sessions, project_of) if name == project}
    return [run for run in runs if session_of(run) in wanted]
