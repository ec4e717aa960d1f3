"""Sessions: lists, search, projects, and a timeline of each."""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.rest import links, responses
from gateway.services import Services, parts
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import NotFound
from knapper.ids import SessionId, Tenant
from knapper.state import damage, timeline, usage
from knapper.state.sessions import Session
from knapper.state.signed_links import Link
from knapper.state.tenant_index import SessionListing
from knapper.wire import json, rest


async def list_sessions(request: Request) -> Response:
    """Newest first."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.convert(responses.query(request), rest.Page)
    listed = await gateway.register.sessions(tenant)
    page = listed[asked.offset : asked.offset + asked.limit]
    return JSONResponse({"sessions": [each.session for each in page]})


async def get_session(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    json.convert(responses.query(request), rest.Access)
    session = await gateway.records.session(request.path_params["session_id"], tenant)
    answer = {
        "training_run_ids": (await gateway.register.runs(tenant, session))[::-1],
        "sampler_ids": await gateway.records.list_samplers(SessionId(session.session)),
        "user_metadata": responses.labels(session.user_metadata_json),
        "display_name": session.display_name or None,
    }
    return JSONResponse(answer)


async def assign_project(request: Request) -> Response:
    """Move the session, and with it its runs and samplers. Projects are labels: naming one makes it."""
    gateway, tenant = parts(request), tenant_of(request)
    session = await gateway.records.session(request.path_params["session_id"], tenant)
    asked = json.decode(await bodies.read(request), rest.SessionProject)
    if await gateway.records.sessions.project(session) != asked.project_id:
        await gateway.audit.write(
            tenant, "project_session_assign", session_id=session.session, project_id=asked.project_id
        )
        await gateway.records.assign(session, asked.project_id)
    return JSONResponse({"status": "ok"})


# ---- search


async def search(request: Request) -> Response:
    """Newest first, a page at a time; the cursor is the last session of the page before."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.decode(await bodies.read(request), rest.SessionSearch)
    after = (_microseconds(asked.cursor.last_created_at), asked.cursor.last_session_id) if asked.cursor else None
    found: list[tuple[SessionListing, dict[str, Any]]] = []
    for listed in await gateway.register.sessions(tenant):
        if asked.display_name is None and asked.session_id not in (None, listed.session):
            continue
        if after is None or (listed.created_us, listed.session) < after:
            summary = await damage.unless(_summary(gateway, listed.session, tenant, asked), None)
            if summary is not None:
                found.append((listed, summary))
            if len(found) > asked.limit:
                break
    page = found[: asked.limit]
    cursor = None
    if len(found) > asked.limit:
        last = page[-1][0]
        at = datetime.fromtimestamp(last.created_us // 10**6, UTC).replace(microsecond=last.created_us % 10**6)
        cursor = {"last_created_at": at.isoformat(), "last_session_id": last.session}
    sessions = [{**summary, **await _stored(gateway, listed.session, tenant)} for listed, summary in page]
    return JSONResponse({"sessions": sessions, "next_cursor": cursor})


async def _summary(
    gateway: Services, session: SessionId, tenant: Tenant, asked: rest.SessionSearch
) -> dict[str, Any] | None:
    try:
        found = await gateway.records.session(session, tenant)
    except NotFound:  # registered, and then its maker died before making it
        return None
    return await _matching(gateway, found, asked)


async def _matching(gateway: Services, session: Session, asked: rest.SessionSearch) -> dict[str, Any] | None:
    """What is told of the session, or None if it is not among those asked for."""
    if isinstance(asked.owner, rest.Users) and session.tenant not in asked.owner.owner_urns:
        return None
    if not _named(session, asked):
        return None
    metadata = responses.labels(session.user_metadata_json) or {}
    if any(metadata.get(name) != value for name, value in asked.user_metadata.items()):
        return None
    project = await gateway.records.project(session.session, Tenant(session.tenant))
    if asked.project_ids is not None and project not in asked.project_ids:
        return None
    status = await _status(gateway, SessionId(session.session))
    if asked.statuses is not None and not any(_is(status, wanted) for wanted in asked.statuses):
        return None
    return {
        "session_id": session.session,
        "created_at": responses.time(session.created_at),
        "owner": session.tenant,
        "project_id": project,
        "status": status,
        "display_name": session.display_name or None,
        "user_metadata": metadata or None,
    }


def _named(session: Session, asked: rest.SessionSearch) -> bool:
    """By its id or by its name: either is enough where both are asked for."""
    if asked.session_id is None and asked.display_name is None:
        return True
    by_name = asked.display_name is not None and all(
        word in session.display_name.casefold() for word in asked.display_name.casefold().split()
    )
    return by_name or session.session == asked.session_id


async def _status(gateway: Services, session: SessionId) -> dict[str, Any] | None:
    finish = await gateway.records.sessions.finished(session)
    if finish is not None:
        return {"type": "client_finished", "reason": {"type": finish.reason}, "detail": finish.detail or None}
    return {"type": "active"} if gateway.heartbeats.heard(session) else None


def _is(status: dict[str, Any] | None, wanted: rest.Status) -> bool:
    if isinstance(wanted, rest.ClientFinished) and status is not None and status["type"] == "client_finished":
        return wanted.reasons is None or status["reason"]["type"] in wanted.reasons
    return isinstance(wanted, rest.Active) and status is not None and status["type"] == "active"


async def _stored(gateway: Services, session: SessionId, tenant: Tenant) -> dict[str, int]:
    saved = await gateway.checkpoints.labels(tenant, within=f"{session}:")
    return {"checkpoints_count": len(saved), "checkpoint_storage_bytes": usage.stored_bytes(saved)}


def _microseconds(at: datetime) -> int:
    return int(at.replace(microsecond=0).timestamp()) * 10**6 + at.microsecond


# ---- timeline


async def trace_export(request: Request) -> Response:
    """A link to the session's timeline. It is drawn when the link is followed, so it is always ready."""
    gateway, tenant = parts(request), tenant_of(request)
    session = await gateway.records.session(request.path_params["session_id"], tenant)
    link = Link(
        kind="trace", tenant=tenant, subject=session.session, expires_at=gateway.clock() + limits.link_s
    )  # fmt: skip
    return JSONResponse({"status": "ready", "url": await links.url(request, link)})


async def trace_of(gateway: Services, link: Link) -> Response:
    session = await gateway.records.session(link.subject, Tenant(link.tenant))
    document = await timeline.of_session(gateway.store, (await gateway.register.runs(link.tenant, session))[::-1])
    return Response(document, media_type="application/json", headers={"Cache-Control": "private, no-store"})
