"""Sessions, and what clients should know about this server: its health, settings, models and notices."""

import msgspec
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies, errors, notices, peers
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper import ids, limits
from knapper.errors import Gone
from knapper.ids import SessionId
from knapper.state.sessions import DAY_S, Finish, Session
from knapper.wire import requests


async def healthz(request: Request) -> Response:
    """The gateway is healthy. `unservable`: why functions cannot serve their base model, one sentence each.

    A header says which gateway it is: others ask before they send it a client's credentials.
    """
    gateway = services_of(request)
    reasons = gateway.unservable_models.reasons
    said = {"status": "ok"} | ({"unservable": reasons} if reasons else {})
    return JSONResponse(said, headers={peers.NAME: gateway.peers.gateways.gateway})


async def client_config(request: Request) -> Response:
    """The flags that clients read once. Absent flags keep the SDK's defaults."""
    gateway = services_of(request)
    tenant_of(request)
    client = requests.decode(await bodies.read(request), requests.ClientConfig)
    flags = {
        "parallel_fwdbwd_chunks": True,
        "proto_compress_fwdbwd": True,
        "sample_use_retrieve_futures": False,  # a client that polls for all samples at once would hang after a restart
        "custom_loss_server_side": False,
        "sample_join_sampling_session": True,
        "pjwt_auth_enabled": gateway.access_tokens is not None,
        "billing_exception_max_pause_duration_sec": limits.quota_pause_s_max,  # it waits for the next day's tokens
    }
    notice = notices.for_header(client.sdk_version, gateway.notice)
    return JSONResponse(flags, headers=errors.notice(notice) if notice else None)


async def client_dynamic_config(request: Request) -> Response:
    """The flags that clients read periodically."""
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
        for model in await services_of(request).lookups.catalogue.models()
    ]
    return JSONResponse({"supported_models": models})


async def create_session(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    settings = requests.decode(await bodies.read(request), requests.CreateSession)
    session = SessionId(f"ses-{gateway.new_id()}")
    record = Session(
        session=session,
        tenant=tenant,
        created_at=gateway.clock(),
        sdk_version=settings.sdk_version,
        project_id=settings.project_id or "",
        display_name=settings.display_name or "",
        tags=settings.tags,
        user_metadata_json=settings.user_metadata_json(),
    )
    await gateway.tenant_index.add_session(record)
    await gateway.lookups.sessions.create(record)
    gateway.heartbeats.record(session)
    notice = notices.for_session(settings.sdk_version, gateway.notice)
    return JSONResponse({"type": "create_session", "session_id": session, "warning_message": notice or None})


async def session_heartbeat(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    heartbeat = requests.decode(await bodies.read(request), requests.Heartbeat)
    session = SessionId((await gateway.lookups.heartbeat_session(heartbeat.session_id, tenant)).session)
    gateway.heartbeats.record(session)
    await gateway.lookups.record_activity(session, int(gateway.clock() // DAY_S))
    return JSONResponse({"type": "session_heartbeat"})


async def finish_session(request: Request) -> Response:
    """The first reason stays. Accepted operations are still applied, and their results can still be read."""
    gateway, tenant = services_of(request), tenant_of(request)
    session = ids.session_id((await gateway.lookups.session(request.path_params["session_id"], tenant)).session)
    body = await bodies.read(request)
    end = requests.decode(body, requests.FinishSession)
    finish = Finish(reason=end.reason.type, detail=end.detail or "", finished_at=gateway.clock())
    await gateway.lookups.finish(session, finish)
    gateway.heartbeats.forget(session)
    gateway.sample_queue.cancel_session(session, Gone(f"session {session} has finished"))
    gateway.unfinished_runs.check_soon(session)
    gateway.accounts.forget(session)
    gateway.wakeups.accounts.set()
    gateway.collector.touch(session)
    gateway.wakeups.collect.set()
    return JSONResponse({"status": "ok"}, background=BackgroundTask(gateway.peers.tell_others, request, body))


async def telemetry(request: Request) -> Response:
    tenant_of(request)
    report = requests.decode(await bodies.read(request), requests.Telemetry)
    return Response(
        msgspec.json.encode({"status": "accepted", "events": len(report.events)}), media_type="application/json"
    )
