"""Checkpoints: lists, and what their owner may do to one."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.rest import responses
from gateway.services import parts
from gateway.tenants import tenant_of
from knapper import ids
from knapper.errors import UserError
from knapper.ids import TinkerPath
from knapper.wire import json, rest

_DONE = {"status": "ok"}


async def list_all(request: Request) -> Response:
    """Of every run of the tenant, newest first."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.convert(responses.query(request), rest.CheckpointsPage)
    found = await gateway.checkpoints.labels(tenant)
    page = await gateway.checkpoints.read(found[asked.offset : asked.offset + asked.limit])
    answer = {
        "checkpoints": [responses.checkpoint(checkpoint) for checkpoint in page],
        "cursor": responses.cursor(asked.offset, asked.limit, len(found)),
    }
    return JSONResponse(answer)


async def delete(request: Request) -> Response:
    """Gone for every new client at once. A sampler that was made from it goes on; its files go when nothing needs them.

    A repetition is silent: the first reply may have been lost.
    """
    gateway, tenant = parts(request), tenant_of(request)
    path = path_of(request)
    if not await gateway.checkpoints.deleted(path, tenant):
        await gateway.checkpoints.own(path, tenant)
        await gateway.audit.write(tenant, "checkpoint_delete", tinker_path=str(path), model_id=path.run)
        await gateway.checkpoints.delete(path, tenant)
        gateway.stirs.collect.set()
    return JSONResponse(_DONE)


async def archive(request: Request) -> Response:
    """Refused: SDK 0.36 and newer do not ask for archives any more."""
    await parts(request).checkpoints.own(path_of(request), tenant_of(request))
    raise UserError(
        "checkpoints are not served as archives; allowed: their files one by one. With SDK 0.36 or newer, use "
        "save_weights_external and get_external_weights_urls, or `tinker checkpoint download`"
    )


async def publish(request: Request) -> Response:
    return await _publish(request, public=True)


async def unpublish(request: Request) -> Response:
    return await _publish(request, public=False)


async def _publish(request: Request, *, public: bool) -> Response:
    """One that is so already stays so: a 409 would be repeated by clients for minutes."""
    gateway, tenant = parts(request), tenant_of(request)
    path = path_of(request)
    if (await gateway.checkpoints.own(path, tenant)).public != public:
        event = "checkpoint_publish" if public else "checkpoint_unpublish"
        await gateway.audit.write(tenant, event, tinker_path=str(path), model_id=path.run)
        await gateway.checkpoints.publish(path, tenant, public)
    return JSONResponse(_DONE)


async def set_ttl(request: Request) -> Response:
    """Counted from now; null: it never expires."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.decode(await bodies.read(request), rest.TtlChange)
    path = path_of(request)
    await gateway.checkpoints.own(path, tenant)
    ttl = "never" if asked.ttl_seconds is None else str(asked.ttl_seconds)
    await gateway.audit.write(tenant, "checkpoint_set_ttl", tinker_path=str(path), model_id=path.run, ttl_seconds=ttl)
    await gateway.checkpoints.set_ttl(path, tenant, asked.ttl_seconds)
    gateway.stirs.collect.set()
    return JSONResponse(_DONE)


def path_of(request: Request) -> TinkerPath:
    """The checkpoint that the URL names. Raises NotFound, or InvalidField."""
    given = request.path_params
    run = ids.run_id(given["run_id"])
    return TinkerPath.parse(f"tinker://{run}/{given['kind']}/{given['name']}", "checkpoint_id")
