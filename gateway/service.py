"""Sessions, what this server can do, and what clients should know about it."""

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies, errors, notices
from gateway.services import parts
from gateway.tenants import tenant_of
from knapper import ids
from knapper.errors import Gone
from knapper.ids import SessionId
from knapper.state.sessions import DAY_S, Finish, Session
from knapper.wire import requests


async def healthz(request: Request) -> Response:
    """The gateway is well. `unservable`: why functions cannot serve their base model, one sentence each."""
    sentences = parts(request).refusals.sentences
    return JSONResponse({"status": "ok"} | ({"unservable": sentences} if sentences else {}))


async def client_config(request: Request) -> Response:
    """The flags that clients read once. Those left out keep the SDK's defaults."""
    gateway = parts(request)
    tenant_of(request)
    asked = requests.decode(await bodies.read(request), requests.ClientConfig)
    flags = {
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": True,
        "sample_use_retrieve_futures": False,  # a client that waits on one poll for all waits for ever after a restart
        "custom_loss_server_side": False,
        "sample_join_sampling_session": True,
        "pjwt_auth_enabled": gateway.tokens is not None,
    }
    note = notices.for_header(asked.sdk_version, gateway.notice)
    return JSONResponse(flags, headers=errors.notice(note) if note else None)


async def client_dynamic_config(request: Request) -> Response:
    """The flags that clients read again and again."""
    tenant_of(request)
    requests.decode(await bodies.read(request), requests.ClientConfig)
    return JSONResponse({"refresh_interval_sec": 300, "sample_cancel_enabled": True})


async def get_server_capabilities(request: Request) -> Response:
    tenant_of(request)
    models = [
        {
            "model_name": model.name,
            "max_context_length": model.context,
            "trainable": model.trainable,
            "sampleable": model.sampleable,
        }
        for model in await parts(request).records.catalogue.models()
    ]
    return JSONResponse({"supported_models": models})


async def create_session(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    asked = requests.decode(await bodies.read(request), requests.CreateSession)
    session = SessionId(f"ses-{gateway.new_id()}")
    record = Session(
        session=session,
        tenant=tenant,
        created_at=gateway.clock(),
        sdk_version=asked.sdk_version,
        project_id=asked.project_id or "",
        display_name=asked.display_name or "",
        tags=asked.tags,
        user_metadata_json=asked.user_metadata_json(),
    )
    await gateway.register.add_session(record)
    await gateway.records.sessions.create(record)
    gateway.heartbeats.hear(session)
    note = notices.for_session(asked.sdk_version, gateway.notice)
    return JSONResponse({"type": "create_session", "session_id": session, "warning_message": note or None})


async def session_heartbeat(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    asked = requests.decode(await bodies.read(request), requests.Heartbeat)
    session = SessionId((await gateway.records.beating_session(asked.session_id, tenant)).session)
    gateway.heartbeats.hear(session)
    await gateway.records.hear(session, int(gateway.clock() // DAY_S))
    return JSONResponse({"type": "session_heartbeat"})


async def finish_session(request: Request) -> Response:
    """The first reason stays. What was accepted is still applied, and its results can still be read."""
    gateway, tenant = parts(request), tenant_of(request)
    session = ids.session_id((await gateway.records.session(request.path_params["session_id"], tenant)).session)
    asked = requests.decode(await bodies.read(request), requests.FinishSession)
    finish = Finish(reason=asked.reason.type, detail=asked.detail or "", finished_at=gateway.clock())
    await gateway.records.finish(session, finish)
    gateway.heartbeats.forget(session)
    gateway.samples.cancel_session(session, Gone(f"session {session} has finished"))
    gateway.waits.stir(session)
    gateway.accounts.forget(session)
    gateway.stirs.accounts.set()
    gateway.collector.touch(session)
    gateway.stirs.collect.set()
    return JSONResponse({"status": "ok"})


async def telemetry(request: Request) -> Response:
    tenant_of(request)
    asked = requests.decode(await bodies.read(request), requests.Telemetry)
    return Response(
        msgspec.json.encode({"status": "accepted", "events": len(asked.events)}), media_type="application/json"
    )
