"""Sessions: list, search, show, assign to projects, and export timelines."""

from datetime import datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.rest import responses
from gateway.services import Services, services_of
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
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), rest.Page)
    listings = await gateway.tenant_index.sessions(tenant)
    page = listings[query.offset : query.offset + query.limit]
    return JSONResponse({"sessions": [listing.session for listing in page]})


async def get_session(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    json.convert(responses.query(request), rest.Access)
    session = await gateway.lookups.session(request.path_params["session_id"], tenant)
    description = {
        "training_run_ids": (await gateway.tenant_index.runs(tenant, session))[::-1],
        "sampler_ids": await gateway.lookups.list_samplers(SessionId(session.session)),
        "user_metadata": responses.labels(session.user_metadata_json),
        "display_name": session.display_name or None,
    }
    return JSONResponse(description)


async def assign_project(request: Request) -> Response:
    """Move the session with its runs and samplers. Projects are labels: assigning to one creates it."""
    gateway, tenant = services_of(request), tenant_of(request)
    session = await gateway.lookups.session(request.path_params["session_id"], tenant)
    assignment = json.decode(await bodies.read(request), rest.SessionProject)
    if await gateway.lookups.sessions.project(session) != assignment.project_id:
        await gateway.audit.write(
            tenant, "project_session_assign", session_id=session.session, project_id=assignment.project_id
        )
        await gateway.lookups.assign(session, assignment.project_id)
    return JSONResponse({"status": "ok"})


# ---- search


async def search(request: Request) -> Response:
    """Newest first, a page at a time; the cursor is the last session of the previous page."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.decode(await bodies.read(request), rest.SessionSearch)
    after = (_microseconds(query.cursor.last_created_at), query.cursor.last_session_id) if query.cursor else None
    matches: list[tuple[SessionListing, dict[str, Any]]] = []
    for listing in await gateway.tenant_index.sessions(tenant):
        if query.display_name is None and query.session_id not in (None, listing.session):
            continue
        if after is None or (listing.created_us, listing.session) < after:
            summary = await damage.unless(_summary(gateway, listing.session, tenant, query), None)
            if summary is not None:
                matches.append((listing, summary))
            if len(matches) > query.limit:
                break
    page = matches[: query.limit]
    cursor = None
    if len(matches) > query.limit:
        last = page[-1][0]
        cursor = {"last_created_at": responses.moment(last.created_us), "last_session_id": last.session}
    sessions = [{**summary, **await _storage(gateway, listing.session, tenant)} for listing, summary in page]
    return JSONResponse({"sessions": sessions, "next_cursor": cursor})


async def _summary(
    gateway: Services, session: SessionId, tenant: Tenant, search: rest.SessionSearch
) -> dict[str, Any] | None:
    try:
        record = await gateway.lookups.session(session, tenant)
    except NotFound:  # the gateway that registered it died before creating it
        return None
    return await _matching(gateway, record, search)


async def _matching(gateway: Services, session: Session, search: rest.SessionSearch) -> dict[str, Any] | None:
    """The session's summary, or None if it does not match the search."""
    if isinstance(search.owner, rest.Users) and session.tenant not in search.owner.owner_urns:
        return None
    if not _named(session, search):
        return None
    metadata = responses.labels(session.user_metadata_json) or {}
    if any(metadata.get(name) != value for name, value in search.user_metadata.items()):
        return None
    project = await gateway.lookups.project(session.session, Tenant(session.tenant))
    if search.project_ids is not None and project not in search.project_ids:
        return None
    status = await _status(gateway, SessionId(session.session))
    if search.statuses is not None and not any(_is(status, wanted) for wanted in search.statuses):
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


def _named(session: Session, search: rest.SessionSearch) -> bool:
    """Whether the id or the name matches: one is enough if the search has both."""
    if search.session_id is None and search.display_name is None:
        return True
    by_name = search.display_name is not None and all(
        word in session.display_name.casefold() for word in search.display_name.casefold().split()
    )
    return by_name or session.session == search.session_id


async def _status(gateway: Services, session: SessionId) -> dict[str, Any] | None:
    finish = await gateway.lookups.sessions.finished(session)
    if finish is not None:
        return {"type": "client_finished", "reason": {"type": finish.reason}, "detail": finish.detail or None}
    return {"type": "active"} if gateway.heartbeats.is_alive(session) else None


def _is(status: dict[str, Any] | None, wanted: rest.Status) -> bool:
    if isinstance(wanted, rest.ClientFinished) and status is not None and status["type"] == "client_finished":
        return wanted.reasons is None or status["reason"]["type"] in wanted.reasons
    return isinstance(wanted, rest.Active) and status is not None and status["type"] == "active"


async def _storage(gateway: Services, session: SessionId, tenant: Tenant) -> dict[str, int]:
    labels = await gateway.checkpoints.labels(tenant, within=f"{session}:")
    return {"checkpoints_count": len(labels), "checkpoint_storage_bytes": usage.stored_bytes(labels)}


def _microseconds(at: datetime) -> int:
    return int(at.replace(microsecond=0).timestamp()) * 10**6 + at.microsecond


# ---- timeline


async def trace_export(request: Request) -> Response:
    """A link to the session's timeline. It is always ready, since following the link builds it."""
    gateway, tenant = services_of(request), tenant_of(request)
    session = await gateway.lookups.session(request.path_params["session_id"], tenant)
    link = Link(
        kind="trace", tenant=tenant, subject=session.session, expires_at=gateway.clock() + limits.link_s
    )  # fmt: skip
    return JSONResponse({"status": "ready", "url": await responses.link_url(request, link)})


async def trace_of(gateway: Services, link: Link) -> Response:
    session = await gateway.lookups.session(link.subject, Tenant(link.tenant))
    document = await timeline.of_session(gateway.store, (await gateway.tenant_index.runs(link.tenant, session))[::-1])
    return Response(document, media_type="application/json", headers={"Cache-Control": "private, no-store"})
