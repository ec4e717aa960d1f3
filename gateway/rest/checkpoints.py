"""Checkpoints: list, delete, publish, and set a time to live."""

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.rest import responses
from gateway.services import Services, services_of
from gateway.tenants import tenant_of
from knapper import ids
from knapper.errors import UserError
from knapper.ids import Tenant, TinkerPath
from knapper.state.checkpoint_index import CheckpointEntry
from knapper.state.checkpoints import Checkpoint
from knapper.wire import json, rest

_DONE = {"status": "ok"}


async def list_all(request: Request) -> Response:
    """The checkpoints of all runs of the tenant, newest first."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), rest.CheckpointsPage)
    labels = await gateway.checkpoints.labels(tenant)
    page = await gateway.checkpoints.read(labels[query.offset : query.offset + query.limit])
    body = {
        "checkpoints": [responses.checkpoint(checkpoint) for checkpoint in page],
        "cursor": responses.cursor(query.offset, query.limit, len(labels)),
    }
    return JSONResponse(body)


async def search(request: Request) -> Response:
    """Newest first, a page at a time; the cursor is the last checkpoint of the previous page."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.decode(await bodies.read(request), rest.CheckpointSearch)
    matches: list[tuple[CheckpointEntry, Checkpoint]] = []
    for entry in _candidates(await gateway.checkpoints.labels(tenant), query):
        read = await gateway.checkpoints.read([entry])  # none, if it is damaged
        matches += [(entry, checkpoint) for checkpoint in read if await _matches(gateway, checkpoint, query)]
        if len(matches) > query.limit:
            break
    page, cursor = matches[: query.limit], None
    if len(matches) > query.limit:
        (last, _) = page[-1]
        cursor = {"last_created_at": responses.moment(_saved_us(last)), "last_checkpoint_uuid": str(last.path)}
    found = [responses.checkpoint(checkpoint) for _, checkpoint in page]
    return JSONResponse({"checkpoints": found, "next_cursor": cursor})


def _candidates(entries: Iterable[CheckpointEntry], query: rest.CheckpointSearch) -> Iterator[CheckpointEntry]:
    """Those after the cursor that match as far as their labels tell."""
    after = None
    if query.cursor is not None:
        at = query.cursor.last_created_at - datetime(1970, 1, 1, tzinfo=UTC)
        after = (at // timedelta(microseconds=1), query.cursor.last_checkpoint_uuid)
    kinds = {kind for kind, name in responses.TYPES.items() if query.checkpoint_type in (None, name)}
    for entry in entries:
        if entry.path.kind in kinds and (after is None or (_saved_us(entry), str(entry.path)) < after):
            yield entry


async def _matches(gateway: Services, checkpoint: Checkpoint, query: rest.CheckpointSearch) -> bool:
    if isinstance(query.owner, rest.Users) and checkpoint.tenant not in query.owner.owner_urns:
        return False
    if query.base_models is not None and checkpoint.base_model not in query.base_models:
        return False
    if any(checkpoint.user_metadata.get(name) != value for name, value in query.user_metadata.items()):
        return False
    if query.project_ids is None:
        return True
    session = ids.session_of(TinkerPath.parse(checkpoint.path).run)
    return await gateway.lookups.project(session, Tenant(checkpoint.tenant)) in query.project_ids


def _saved_us(entry: CheckpointEntry) -> int:
    return round(entry.saved_at * 10**6)


async def delete(request: Request) -> Response:
    """New clients no longer find it. Existing samplers keep working; the files are deleted once nothing needs them.

    Idempotent, since the first response may have been lost.
    """
    gateway, tenant = services_of(request), tenant_of(request)
    path = path_of(request)
    if not await gateway.checkpoints.deleted(path, tenant):
        await gateway.checkpoints.own(path, tenant)
        await gateway.audit.write(tenant, "checkpoint_delete", tinker_path=str(path), model_id=path.run)
        await gateway.checkpoints.delete(path, tenant)
        gateway.wakeups.collect.set()
    return JSONResponse(_DONE)


async def archive(request: Request) -> Response:
    """Refused: SDK 0.36 and newer no longer request archives."""
    await services_of(request).checkpoints.own(path_of(request), tenant_of(request))
    raise UserError(
        "checkpoints are not served as archives; allowed: their files one by one. With SDK 0.36 or newer, use "
        "save_weights_external and get_external_weights_urls, or `tinker checkpoint download`"
    )


async def publish(request: Request) -> Response:
    return await _publish(request, public=True)


async def unpublish(request: Request) -> Response:
    return await _publish(request, public=False)


async def _publish(request: Request, *, public: bool) -> Response:
    """Idempotent: clients would retry a 409 for minutes."""
    gateway, tenant = services_of(request), tenant_of(request)
    path = path_of(request)
    if (await gateway.checkpoints.own(path, tenant)).public != public:
        event = "checkpoint_publish" if public else "checkpoint_unpublish"
        await gateway.audit.write(tenant, event, tinker_path=str(path), model_id=path.run)
        await gateway.checkpoints.publish(path, tenant, public)
    return JSONResponse(_DONE)


async def set_ttl(request: Request) -> Response:
    """From now; null: the checkpoint never expires."""
    gateway, tenant = services_of(request), tenant_of(request)
    change = json.decode(await bodies.read(request), rest.TtlChange)
    path = path_of(request)
    await gateway.checkpoints.own(path, tenant)
    ttl = "never" if change.ttl_seconds is None else str(change.ttl_seconds)
    await gateway.audit.write(tenant, "checkpoint_set_ttl", tinker_path=str(path), model_id=path.run, ttl_seconds=ttl)
    await gateway.checkpoints.set_ttl(path, tenant, change.ttl_seconds)
    gateway.wakeups.collect.set()
    return JSONResponse(_DONE)


def path_of(request: Request) -> TinkerPath:
    """The checkpoint that the URL names. Raises NotFound, or InvalidField."""
    params = request.path_params
    run = ids.run_id(params["run_id"])
    return TinkerPath.parse(f"tinker://{run}/{params['kind']}/{params['name']}", "checkpoint_id")
