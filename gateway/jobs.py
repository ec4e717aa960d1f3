"""Jobs for clients: submitted with their files, listed, shown, cancelled, resumed."""

from typing import Annotated

import structlog
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.rest import responses
from gateway.routing import Door
from gateway.services import Parts, parts
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import InvalidField, Unavailable
from knapper.events import cloudevents
from knapper.ids import Tenant
from knapper.jobs import control, listings, names, notifications, outputs, revive
from knapper.jobs.inbox import again, look, was_started
from knapper.jobs.records import Started, read
from knapper.jobs.services import Place
from knapper.state import layout
from knapper.wire import fields, json

_FILES_MAX = 64

log = structlog.get_logger()


class Submit(fields.Request, frozen=True, kw_only=True):
    """`files`: their texts; job.yaml is one of them. `name`: none makes one up."""

    name: Annotated[str, Meta(max_length=63)] | None = None
    files: Annotated[dict[str, str], Meta(min_length=1, max_length=_FILES_MAX)]
    again: bool = False  # start them once more, though the same files were started before


class List(fields.Request, frozen=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=limits.jobs_told_max)] = 100
    offset: Annotated[int, Meta(ge=0, le=10**9)] = 0


class Show(fields.Request, frozen=True, kw_only=True):
    after: Annotated[int, Meta(ge=0, le=10**9)] = 0


def submitted(body: bytes) -> tuple[str | None, bool, dict[str, bytes]]:
    """(the job's name, whether it starts again, its files by their names, job.yaml among them). Raises UserError."""
    asked = json.decode(body, Submit)
    if names.JOB_YAML not in asked.files:
        raise InvalidField("files", sorted(asked.files), f"{names.JOB_YAML} among them")
    return asked.name, asked.again, {names.file(name): text.encode() for name, text in asked.files.items()}


async def submit(request: Request) -> Response:
    """Put the files where uploads go, and look: the same road as any other.

    Answers what `show` does, and `equal`: whether these very files were started before, and are not now.
    """
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    named, once_more, files = await bodies.computed(request, submitted, body)
    place = _place(gateway)
    job = names.job(named or f"job-{gateway.new_id()[:12]}")
    inbox = layout.inbox(tenant, job)
    equal = not once_more and await was_started(place, tenant, job, files)
    # Without a job.yaml nothing starts: nobody shall find new files beside old ones.
    await place.exchange.remove(f"{inbox}{names.JOB_YAML}")
    for name in sorted(files, key=lambda name: name == names.JOB_YAML):
        await place.exchange.publish(f"{inbox}{name}", files[name])
    start = await (again if once_more else look)(place, tenant, job)
    gateway.stirs.jobs.set()
    if start is not None:
        await place.bells.post(await revive.first(place, start))
    return JSONResponse(await listings.whole(place, tenant, job, 0, gateway.present) | {"equal": equal})


async def list_jobs(request: Request) -> Response:
    """Newest first, a page at a time: only of those that are told of anything is read."""
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.convert(responses.query(request), List)
    found = await listings.listed(gateway.store, tenant)
    page = found[asked.offset : asked.offset + asked.limit]
    answer = {
        "jobs": await listings.briefs(gateway.store, page),
        "cursor": responses.cursor(asked.offset, asked.limit, len(found)),
    }
    return JSONResponse(answer)


async def show(request: Request) -> Response:
    gateway, tenant = parts(request), tenant_of(request)
    asked = json.convert(responses.query(request), Show)
    told = await listings.whole(_place(gateway), tenant, request.path_params["job"], asked.after, gateway.present)
    return JSONResponse(told)


async def cancel(request: Request) -> Response:
    """Nothing more is begun for it; what is under way ends within one operation."""
    gateway, tenant = parts(request), tenant_of(request)
    place = _place(gateway)
    found = await listings.newest(place.store, tenant, request.path_params["job"])
    started = await _started(place, found)
    await control.ask(place.store, found.start, "cancelled", "cancelled by its owner", place.clock())
    await place.store.delete(found.start.working)
    log.info("job cancelled", job=str(found.start))
    await outputs.publish_status(place, started)
    first = notifications.started(started)
    await place.bells.ring(first, cloudevents.JOB_CANCELLED, "knapper/gateway", 0)
    return await _told(gateway, tenant, found)


async def resume(request: Request) -> Response:
    """Go on where it stopped."""
    gateway, tenant = parts(request), tenant_of(request)
    place = _place(gateway)
    found = await listings.newest(place.store, tenant, request.path_params["job"])
    started = await _started(place, found)
    await control.ask(place.store, found.start, "running", "", place.clock())
    await place.store.put_if_absent(found.start.working, b"")
    gateway.stirs.jobs.set()
    log.info("job resumed", job=str(found.start))
    await outputs.publish_status(place, started)
    for event in await revive.again(place, started, found.start):
        await place.bells.post(event)
    return await _told(gateway, tenant, found)


async def _started(place: Place, found: listings.Listed) -> Started:
    started = await read(place.store, found.start.started, Started)
    if started is None:
        raise InvalidField("job", found.start.job, "a job that has started", "See its error in `knapper jobs show`")
    return started


async def _told(gateway: Parts, tenant: Tenant, found: listings.Listed) -> Response:
    place = _place(gateway)
    return JSONResponse(await listings.whole(place, tenant, found.start.job, 10**9, gateway.present))


def _place(gateway: Parts) -> Place:
    if gateway.place is None:
        raise Unavailable("this gateway has no exchange; its operator sets KNAPPER_EXCHANGE and KNAPPER_BROKER_URL")
    return gateway.place


ROUTES = [
    Door("/api/v1/jobs", submit, methods=["POST"], body_bytes_max=limits.body_bytes_max),
    Door("/api/v1/jobs", list_jobs, methods=["GET"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}", show, methods=["GET"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}/cancel", cancel, methods=["POST"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}/resume", resume, methods=["POST"], body_bytes_max=0),
]
