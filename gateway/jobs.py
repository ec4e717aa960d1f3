"""Jobs for clients: submitted with their files, listed, shown, cancelled, resumed, deleted."""

import hashlib
from dataclasses import dataclass
from typing import Annotated

import structlog
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gateway import bodies
from gateway.rest import responses, runs
from gateway.routing import Door
from gateway.services import Services, parts
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import InvalidField, NotFound, TooLarge, Unavailable
from knapper.events import cloudevents
from knapper.ids import RunId, Tenant
from knapper.jobs import control, deletion, listings, names, notifications, outputs, revive, staging
from knapper.jobs.inbox import again, look, was_started
from knapper.jobs.services import JobServices
from knapper.state import layout
from knapper.state.job_records import Started, read
from knapper.wire import fields, json

log = structlog.get_logger()


class Uploaded(Struct, frozen=True, forbid_unknown_fields=True):
    """A file whose parts were sent before."""

    sha256: str
    size: Annotated[int, Meta(ge=1, le=limits.job_upload_bytes_max)]


class Submit(fields.RequestBody, frozen=True, kw_only=True):
    """`files`: their texts; job.yaml is one of them. `uploads`: of others, what they are. `name`: none makes one up."""

    name: Annotated[str, Meta(max_length=limits.job_name_chars_max)] | None = None
    files: Annotated[dict[str, str], Meta(min_length=1, max_length=limits.job_files_max)]
    uploads: Annotated[dict[str, Uploaded], Meta(max_length=limits.job_files_max)] = {}
    again: bool = False  # start them once more, though the same files were started before


class List(fields.RequestBody, frozen=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=limits.jobs_listed_max)] = 100
    offset: Annotated[int, Meta(ge=0, le=limits.offset_max)] = 0


class Show(fields.RequestBody, frozen=True, kw_only=True):
    after: Annotated[int, Meta(ge=0, le=limits.offset_max)] = 0


@dataclass(frozen=True)
class Submitted:
    """`files`: by their names, job.yaml among them; `uploads`: the others."""

    name: str | None
    again: bool
    files: dict[str, bytes]
    uploads: dict[str, Uploaded]


def submitted(body: bytes) -> Submitted:
    """Raises UserError."""
    asked = json.decode(body, Submit)
    if names.JOB_YAML not in asked.files:
        raise InvalidField("files", sorted(asked.files), f"{names.JOB_YAML} among them")
    if both := asked.files.keys() & asked.uploads.keys():
        raise InvalidField("uploads", min(both), "names that are not in files, too")
    files = {names.file(name): text.encode() for name, text in asked.files.items()}
    uploads = {names.file(name): upload for name, upload in asked.uploads.items()}
    size = sum(map(len, files.values())) + sum(upload.size for upload in uploads.values())
    if size > limits.job_upload_bytes_max:
        raise TooLarge(
            f"the job's files have {size} bytes; allowed: {limits.job_upload_bytes_max} in all; leave rows out, or "
            "copy the folder into the server's inbox"
        )
    return Submitted(asked.name, asked.again, files, uploads)


async def submit(request: Request) -> Response:
    """Put the files where uploads go, and look: the same road as any other.

    Answers what `show` does, and `equal`: whether these very files were started before, and are not now.
    """
    gateway, tenant = parts(request), tenant_of(request)
    body = await bodies.read(request)
    sent = await bodies.computed(request, submitted, body)
    place = place_of(gateway)
    job = names.job(sent.name or f"job-{gateway.new_id()[:12]}")
    inbox = layout.inbox(tenant, job)
    uploads = {name: staging.File(tenant, names.sha256(one.sha256), one.size) for name, one in sent.uploads.items()}
    for name, file in uploads.items():
        await staging.expect_whole(place.exchange, name, file)
    sha256s = {name: hashlib.sha256(data).hexdigest() for name, data in sent.files.items()}
    sha256s |= {name: file.sha256 for name, file in uploads.items()}
    equal = not sent.again and await was_started(place, tenant, job, sent.files[names.JOB_YAML], sha256s)
    # Without a job.yaml nothing starts: nobody shall find new files beside old ones.
    await place.exchange.remove(f"{inbox}{names.JOB_YAML}")
    for name, file in uploads.items():
        await staging.assemble(place.exchange, file, f"{inbox}{name}")
    for name in sorted(sent.files, key=lambda name: name == names.JOB_YAML):
        await place.exchange.publish(f"{inbox}{name}", sent.files[name])
    start = await (again if sent.again else look)(place, tenant, job)
    for file in uploads.values():
        await staging.forget(place.exchange, file)
    gateway.stirs.jobs.set()
    if start is not None:
        await place.notifier.post(await revive.first(place, start))
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
    told = await listings.whole(place_of(gateway), tenant, request.path_params["job"], asked.after, gateway.present)
    return JSONResponse(told)


async def cancel(request: Request) -> Response:
    """Nothing more is begun for it; what is under way ends within one operation."""
    gateway, tenant = parts(request), tenant_of(request)
    place = place_of(gateway)
    found = await listings.newest(place.store, tenant, request.path_params["job"])
    started = await _started(place, found)
    await control.ask(place.store, found.start, "cancelled", "cancelled by its owner", place.clock())
    await place.store.delete(found.start.working)
    log.info("job cancelled", job=str(found.start))
    await outputs.publish_status(place, started)
    first = notifications.started(started)
    await place.notifier.ring(first, cloudevents.JOB_CANCELLED, "knapper/gateway", 0)
    return await _told(gateway, tenant, found)


async def resume(request: Request) -> Response:
    """Go on where it stopped."""
    gateway, tenant = parts(request), tenant_of(request)
    place = place_of(gateway)
    found = await listings.newest(place.store, tenant, request.path_params["job"])
    started = await _started(place, found)
    await control.ask(place.store, found.start, "running", "", place.clock())
    await place.store.put_if_absent(found.start.working, b"")
    gateway.stirs.jobs.set()
    log.info("job resumed", job=str(found.start))
    await outputs.publish_status(place, started)
    for event in await revive.again(place, started, found.start):
        await place.notifier.post(event)
    return await _told(gateway, tenant, found)


async def delete(request: Request) -> Response:
    """For good: files, records, the run with its checkpoints. One that runs has to be cancelled before."""
    gateway, tenant = parts(request), tenant_of(request)
    place = place_of(gateway)
    job = (await listings.newest(place.store, tenant, request.path_params["job"])).start.job
    await deletion.mark(place, tenant, job)
    await gateway.audit.write(tenant, "job_delete", job=job)

    async def erase(run: RunId) -> None:
        try:
            await runs.erase(gateway, tenant, run)
        except NotFound:  # it was never made
            pass

    await deletion.delete(place, tenant, job, erase)
    return JSONResponse({"status": "ok"})


async def _started(place: JobServices, found: listings.JobListing) -> Started:
    started = await read(place.store, found.start.started, Started)
    if started is None:
        raise InvalidField("job", found.start.job, "a job that has started", "See its error in `knapper jobs show`")
    return started


async def _told(gateway: Services, tenant: Tenant, found: listings.JobListing) -> Response:
    place = place_of(gateway)
    return JSONResponse(await listings.whole(place, tenant, found.start.job, 10**9, gateway.present))


def place_of(gateway: Services) -> JobServices:
    if gateway.place is None:
        raise Unavailable("this gateway has no exchange; its operator sets KNAPPER_EXCHANGE and KNAPPER_BROKER_URL")
    return gateway.place


ROUTES = [
    Door("/api/v1/jobs", submit, methods=["POST"], body_bytes_max=limits.body_bytes_max),
    Door("/api/v1/jobs", list_jobs, methods=["GET"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}", show, methods=["GET"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}", delete, methods=["DELETE"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}/cancel", cancel, methods=["POST"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}/resume", resume, methods=["POST"], body_bytes_max=0),
]
