"""Training runs: lists and single ones."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway.rest import responses
from gateway.services import Services, parts
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
    """Those of the newest session first, and of a session the newest."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.convert(responses.query(request), rest.RunsPage)
    runs = await gateway.register.runs(tenant)
    if asked.project_id is not None:
        runs = await _in_project(gateway, tenant, runs, asked.project_id)
    page = runs[asked.offset : asked.offset + asked.limit]

    async def shown(run: RunId) -> dict[str, Any] | None:
        try:
            spec = await gateway.records.spec(run, tenant)
        except NotFound:  # registered, and then its maker died before making it
            return None
        return await _shape(gateway, spec)

    found = [run for run in await damage.readable(page, shown) if run is not None]
    answer = {"training_runs": found, "cursor": responses.cursor(asked.offset, asked.limit, len(runs))}
    return JSONResponse(answer)


async def get_run(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    json.convert(responses.query(request), rest.Access)
    spec = await gateway.records.spec(request.path_params["run_id"], tenant)
    return JSONResponse(await _shape(gateway, spec))


async def delete_run(request: Request) -> Response:
    """With all that is of it, checkpoints included, at once and for good; what others lead to stays for those.

    A repetition is silent: the first reply may have been lost.
    """
    gateway, tenant = parts(request), tenant_of(request)
    await erase(gateway, tenant, ids.run_id(request.path_params["run_id"]))
    return JSONResponse({"status": "ok"})


async def erase(gateway: Services, tenant: Tenant, run: RunId) -> None:
    """Raises NotFound."""
    end = await ends.ended(gateway.store, run)
    if end is None or end.tenant != tenant or end.reason != "deleted":
        await gateway.records.spec(run, tenant)
        await gateway.audit.write(tenant, "training_run_delete", model_id=run)
    await gateway.collector.delete(run, tenant)
    gateway.records.forget_run(run)
    gateway.records.forget_samplers()
    await gateway.bells.forget(run)
    gateway.stirs.collect.set()


async def list_checkpoints(request: Request) -> Response:
    """All of the run, newest first."""
    gateway, tenant = parts(request), tenant_of(request)
    spec = await gateway.records.spec(request.path_params["run_id"], tenant)
    found = await gateway.checkpoints.listed(tenant, within=f"{spec.run}/")
    return JSONResponse({"checkpoints": [responses.checkpoint(checkpoint) for checkpoint in found], "cursor": None})


async def _shape(gateway: Services, spec: Spec) -> dict[str, Any]:
    saved = await gateway.checkpoints.labels(Tenant(spec.tenant), within=f"{spec.run}/")
    newest = {label.path.kind: label for label in reversed(saved)}
    read = await gateway.checkpoints.read(label for kind in _SHOWN if (label := newest.get(kind)) is not None)
    shown = {TinkerPath.parse(checkpoint.path).kind: responses.checkpoint(checkpoint) for checkpoint in read}
    name = await _name(gateway, spec)
    labels = responses.labels(spec.user_metadata_json)
    return {
        "training_run_id": spec.run,
        **({"name": name} if name else {}),
        "base_model": spec.base_model,
        "model_owner": spec.tenant,
        "is_lora": True,
        "lora_rank": spec.rank,
        "last_request_time": responses.time(await gateway.records.asked_at(RunId(spec.run))),
        "last_checkpoint": shown.get("weights"),
        "last_sampler_checkpoint": shown.get("sampler_weights"),
        "user_metadata": {"job": name} if name else labels,  # SDKs have no field for a name
    }


async def _name(gateway: Services, spec: Spec) -> str:
    """Of the job that the run is of; empty for a client's."""
    return job_names.of(
        await damage.unless(gateway.records.session(session_of(RunId(spec.run)), Tenant(spec.tenant)), None)
    )


async def _in_project(gateway: Services, tenant: Tenant, runs: list[RunId], project: str) -> list[RunId]:
    sessions = list(dict.fromkeys(session_of(run) for run in runs))

    async def found(session: SessionId) -> tuple[SessionId, str]:
        return session, await gateway.records.project(session, tenant)

    wanted = {session for session, its in await damage.readable(sessions, found) if its == project}
    return [run for run in runs if session_of(run) in wanted]
