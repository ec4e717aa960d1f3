"""What there is: runs and jobs, sessions with their samplers, checkpoints; newest first, a page at a time."""

import re
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from gateway.console.pages import Viewer, page, render
from gateway.rest import responses, runs
from gateway.services import Services
from knapper import limits
from knapper.errors import InvalidField
from knapper.ids import RunId, SamplerId, SessionId, Tenant
from knapper.jobs import job_names, listings
from knapper.state import damage
from knapper.state.recent import PageStart
from knapper.state.sessions import Sampler, Session
from knapper.state.tenant_index import SessionListing
from knapper.store import many

_ROWS: Final = limits.console_page_rows_max
_COMPARED: Final = limits.console_compared_max
_FIRST_JOBS: Final = 6  # of the first page; the others have a page of their own
_SESSION_RUNS: Final = 100
_CURSOR: Final = re.compile(r"([0-9]{1,17})-([0-9]{1,9})")
_SKEW_S: Final = 3600.0  # another gateway's clock may be ahead by this
_ENGINES: Final = ("train_step", "sample")
_WORDS: Final = {"absent": "asleep", "loading": "loading the model", "ready": "awake"}


@dataclass(frozen=True)
class RunActivity:
    """What a run does now. `state`: working, waiting or idle; `reason`: for people, of one that waits."""

    state: str
    reason: str = ""


async def show(request: Request, viewer: Viewer) -> Response:
    gateway, tenant = viewer.gateway, viewer.tenant
    before, first = cursor_of(request, viewer), is_first(request)
    found, older = await gateway.tenant_index.runs_page(tenant, _ROWS, before)
    rows = _rows(gateway, await runs.described(gateway, tenant, found))
    jobs: list[dict[str, Any]] = []
    if first:
        listed, _ = await listings.listed_page(gateway.store, tenant, _FIRST_JOBS, before)
        jobs = await listings.briefs(gateway.store, listed)
    return render(
        request, viewer, "home.html", rows=rows, jobs=jobs, older=older, first=first,
        functions=await functions_of(gateway), unservable=gateway.unservable_models.reasons, compared=_COMPARED,
    )  # fmt: skip


def _rows(gateway: Services, described: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With what each run does now."""
    return [run | {"activity": activity_of(gateway, RunId(run["training_run_id"]))} for run in described]


async def list_jobs(request: Request, viewer: Viewer) -> Response:
    gateway, before = viewer.gateway, cursor_of(request, viewer)
    listed, older = await listings.listed_page(gateway.store, viewer.tenant, _ROWS, before)
    jobs = await listings.briefs(gateway.store, listed)
    return render(request, viewer, "jobs.html", jobs=jobs, older=older, first=is_first(request), compared=_COMPARED)


async def list_sessions(request: Request, viewer: Viewer) -> Response:
    gateway, before = viewer.gateway, cursor_of(request, viewer)
    listed, older = await gateway.tenant_index.sessions_page(viewer.tenant, _ROWS, before)

    async def read(listing: SessionListing) -> dict[str, Any] | None:
        session = await gateway.lookups.sessions.find(listing.session)
        if session is None or session.tenant != viewer.tenant:
            return None
        finish = await gateway.lookups.sessions.finished(listing.session)
        return {"session": session, "job": job_names.of(session), "finish": finish}

    rows = [row for row in await damage.readable(listed, read) if row is not None]
    return render(request, viewer, "sessions.html", rows=rows, older=older, first=is_first(request))


async def show_session(request: Request, viewer: Viewer) -> Response:
    gateway, tenant = viewer.gateway, viewer.tenant
    session = await gateway.lookups.session(request.path_params["session_id"], tenant)
    session_id = SessionId(session.session)
    found = await gateway.tenant_index.runs(tenant, session)
    rows = _rows(gateway, await runs.described(gateway, tenant, found[:_SESSION_RUNS]))
    samplers = await _samplers(gateway, tenant, session_id)
    finish = await gateway.lookups.sessions.finished(session_id)
    project = await gateway.lookups.project(session.session, tenant)
    return render(
        request, viewer, "session.html", session=session, rows=rows, runs_count=len(found), samplers=samplers[0],
        samplers_count=samplers[1], finish=finish, project=project, metadata=_labels(session), compared=_COMPARED,
        job=job_names.of(session),
    )  # fmt: skip


async def list_checkpoints(request: Request, viewer: Viewer) -> Response:
    """Those of the newest runs."""
    gateway, before = viewer.gateway, cursor_of(request, viewer)
    found, older = await gateway.tenant_index.runs_page(viewer.tenant, _ROWS, before)
    listed = await many.each(found, lambda run: checkpoints_of(gateway, viewer.tenant, run))
    rows = [(run, *of_run) for run, of_run in zip(found, listed, strict=True) if of_run[0]]
    return render(request, viewer, "checkpoints.html", rows=rows, older=older, first=is_first(request))


async def checkpoints_of(gateway: Services, tenant: Tenant, run: RunId) -> tuple[list[dict[str, Any]], int]:
    """(the newest of the run, newest first; how many it has)"""
    labels = await gateway.checkpoints.labels(tenant, within=f"{run}/")
    newest = await gateway.checkpoints.read(labels[:_ROWS])
    return [responses.checkpoint(each) | {"run": run, "saved_at": each.saved_at} for each in newest], len(labels)


async def _samplers(gateway: Services, tenant: Tenant, session: SessionId) -> tuple[list[Sampler], int]:
    """(the newest, how many). To look at one does not keep its weights alive, as its client's listing does."""
    listed = (await gateway.lookups.samplers.of_session(session))[::-1]

    async def read(sampler: SamplerId) -> Sampler:
        return await gateway.lookups.samplers.get(sampler, tenant)

    return await damage.readable(listed[:_ROWS], read), len(listed)


def is_first(request: Request) -> bool:
    """Whether it is the page of the newest."""
    return "before" not in request.query_params


def cursor_of(request: Request, viewer: Viewer) -> PageStart:
    """Where the page begins. Raises InvalidField."""
    text = request.query_params.get("before")
    if text is None:
        return newest(viewer)
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise InvalidField("before", text[:80], "a cursor: what the link to older ones has")
    return PageStart(int(match[1]), int(match[2]))


def newest(viewer: Viewer) -> PageStart:
    """Before which is everything."""
    return PageStart(int((viewer.gateway.clock() + _SKEW_S) * 1e6))


def activity_of(gateway: Services, run: RunId) -> RunActivity:
    if run not in gateway.train_client.unfinished():
        return RunActivity("idle")
    state, reason = gateway.train_client.queue_state(run)
    return RunActivity("working" if state == "active" else "waiting", reason or "")


async def functions_of(gateway: Services) -> list[tuple[str, str]]:
    """(function, whether it is awake), where that is known: on one machine. Of several models each has its own."""
    models = [record.name for record in await gateway.lookups.catalogue.models()]
    asked = [(function, model) for model in models for function in _ENGINES] + [("reward", "")]
    known = [(function, model, gateway.presence(function, model)) for function, model in asked]
    return [
        (f"{function}, {model}" if model and len(models) > 1 else function, _WORDS[presence.state])
        for function, model, presence in known
        if presence is not None
    ]


def _labels(session: Session) -> dict[str, str]:
    return responses.labels(session.user_metadata_json) or {}


ROUTES = [
    page("/", show),
    page("/jobs", list_jobs),
    page("/sessions", list_sessions),
    page("/sessions/{session_id}", show_session),
    page("/checkpoints", list_checkpoints),
]
