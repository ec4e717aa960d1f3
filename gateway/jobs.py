"""Jobs over HTTP: submit with files, list, show, cancel, resume, delete."""

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
from gateway.services import Services, services_of
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import InvalidField, NotFound, TooLarge, Unavailable
from knapper.events import cloudevents
from knapper.ids import RunId, Tenant
from knapper.jobs import bells, control, deletion, listings, names, notifications, outputs, revive, staging
from knapper.jobs.inbox import again, look, was_started
from knapper.jobs.services import JobServices
from knapper.jobs.spec import decode
from knapper.jobs.sweep import halt
from knapper.state import layout
from knapper.state.job_records import Started, read
from knapper.wire import fields, json

log = structlog.get_logger()


class UploadedFile(Struct, frozen=True, forbid_unknown_fields=True):
    """A file that was uploaded in parts before."""

    sha256: str
    size: Annotated[int, Meta(ge=1, le=limits.job_upload_bytes_max)]


class Submit(fields.RequestBody, frozen=True, kw_only=True):
    """`files`: name -> text, job.yaml included. `uploads`: name -> uploaded file. `name`: null generates one."""

    name: Annotated[str, Meta(max_length=limits.job_name_chars_max)] | None = None
    files: Annotated[dict[str, str], Meta(min_length=1, max_length=limits.job_files_max)]
    uploads: Annotated[dict[str, UploadedFile], Meta(max_length=limits.job_files_max)] = {}
    again: bool = False  # start the job even if the same files were started before


class List(fields.RequestBody, frozen=True, kw_only=True):
    limit: Annotated[int, Meta(ge=1, le=limits.jobs_listed_max)] = 100
    offset: Annotated[int, Meta(ge=0, le=limits.offset_max)] = 0


class Show(fields.RequestBody, frozen=True, kw_only=True):
    after: Annotated[int, Meta(ge=0, le=limits.offset_max)] = 0


@dataclass(frozen=True)
class Submission:
    """`files`: name -> content, job.yaml included. `uploads`: name -> uploaded file."""

    name: str | None
    again: bool
    files: dict[str, bytes]
    uploads: dict[str, UploadedFile]


def parse_submission(body: bytes) -> Submission:
    """Raises UserError."""
    job = json.decode(body, Submit)
    if names.JOB_YAML not in job.files:
        raise InvalidField("files", sorted(job.files), f"{names.JOB_YAML} among them")
    if both := job.files.keys() & job.uploads.keys():
        raise InvalidField("uploads", min(both), "names that are not in files, too")
    files = {names.file(name): text.encode() for name, text in job.files.items()}
    uploads = {names.file(name): upload for name, upload in job.uploads.items()}
    size = sum(map(len, files.values())) + sum(upload.size for upload in uploads.values())
    if size > limits.job_upload_bytes_max:
        raise TooLarge(
            f"the job's files have {size} bytes; allowed: {limits.job_upload_bytes_max} in all; leave rows out, or "
            "copy the folder into the server's inbox"
        )
    return Submission(job.name, job.again, files, uploads)


async def submit(request: Request) -> Response:
    """Publish the files to the inbox and start the job from there, like any upload.

    The response is that of `show`, and `equal`: true if the same files were started before, and so are not again.
    """
    gateway, tenant = services_of(request), tenant_of(request)
    body = await bodies.read(request)
    submission = await bodies.in_worker(request, parse_submission, body)
    job_services = job_services_of(gateway)
    exchange = job_services.exchange
    job = names.chosen(submission.name or f"job-{gateway.new_id()[:12]}")
    inbox = layout.inbox(tenant, job)
    uploads = {
        name: staging.File(tenant, names.sha256(upload.sha256), upload.size)
        for name, upload in submission.uploads.items()
    }
    for name, file in uploads.items():
        await staging.expect_whole(exchange, name, file)
    sha256s = {name: hashlib.sha256(data).hexdigest() for name, data in submission.files.items()}
    sha256s |= {name: file.sha256 for name, file in uploads.items()}
    equal = not submission.again and await was_started(
        job_services, tenant, job, submission.files[names.JOB_YAML], sha256s
    )
    if not equal:
        size = sum(map(len, submission.files.values())) + sum(file.size for file in uploads.values())
        await gateway.admission.expect_bytes(tenant, size)
    # Removing job.yaml first keeps the job from starting with a mix of old and new files.
    await exchange.remove(f"{inbox}{names.JOB_YAML}")
    for name, file in uploads.items():
        await staging.assemble(exchange, file, f"{inbox}{name}")
    for name in sorted(submission.files, key=lambda name: name == names.JOB_YAML):
        await exchange.publish(f"{inbox}{name}", submission.files[name])
    start = await (again if submission.again else look)(job_services, tenant, job)
    for file in uploads.values():
        await staging.forget(exchange, file)
    gateway.wakeups.jobs.set()
    for event in [] if start is None else await revive.first(job_services, start):
        await job_services.notifier.post(event)
    return JSONResponse(await listings.whole(job_services, tenant, job, 0, gateway.presence) | {"equal": equal})


async def list_jobs(request: Request) -> Response:
    """Newest first, a page at a time: the details of jobs on other pages are not read."""
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), List)
    jobs = await listings.listed(gateway.store, tenant)
    page = jobs[query.offset : query.offset + query.limit]
    body = {
        "jobs": await listings.briefs(gateway.store, page),
        "cursor": responses.cursor(query.offset, query.limit, len(jobs)),
    }
    return JSONResponse(body)


async def show(request: Request) -> Response:
    gateway, tenant = services_of(request), tenant_of(request)
    query = json.convert(responses.query(request), Show)
    job = request.path_params["job"]
    return JSONResponse(await listings.whole(job_services_of(gateway), tenant, job, query.after, gateway.presence))


async def cancel(request: Request) -> Response:
    """Start no more work for the job; the work under way ends within one operation."""
    gateway, tenant = services_of(request), tenant_of(request)
    job_services = job_services_of(gateway)
    listing = await listings.newest(job_services.store, tenant, request.path_params["job"])
    started = await _started(job_services, listing)
    await control.ask(job_services.store, listing.start, "cancelled", "cancelled by its owner", job_services.clock())
    await halt.all_trials(job_services, listing.start)
    await job_services.store.delete(listing.start.working)
    log.info("job cancelled", job=str(listing.start))
    await outputs.publish_status(job_services, started)
    first = notifications.started(started)
    await job_services.notifier.ring(first, cloudevents.JOB_CANCELLED, "knapper/gateway", 0)
    return await _show(gateway, tenant, listing)


async def resume(request: Request) -> Response:
    """Continue the job where it stopped; a sweep with those trials that stopped with it."""
    gateway, tenant = services_of(request), tenant_of(request)
    job_services = job_services_of(gateway)
    listing = await listings.newest(job_services.store, tenant, request.path_params["job"])
    started = await _started(job_services, listing)
    if started.sweep:
        todo = f"Resume the sweep, {names.sweep_of(started.job)}, or submit this trial's job.yaml as a job of its own"
        raise InvalidField("job", started.job, "a job that is no trial of a sweep", todo)
    await control.ask(job_services.store, listing.start, "running", "", job_services.clock())
    await job_services.store.put_if_absent(listing.start.working, b"")
    gateway.wakeups.jobs.set()
    log.info("job resumed", job=str(listing.start))
    await outputs.publish_status(job_services, started)
    is_sweep = decode(started.spec_json).sweep is not None
    for event in await (
        revive.first(job_services, listing.start) if is_sweep else bells.again(job_services, started, listing.start)
    ):
        await job_services.notifier.post(event)
    return await _show(gateway, tenant, listing)


async def delete(request: Request) -> Response:
    """Delete the job for good: its files, records and run with checkpoints. A running job must be cancelled first."""
    gateway, tenant = services_of(request), tenant_of(request)
    job_services = job_services_of(gateway)
    job = (await listings.newest(job_services.store, tenant, request.path_params["job"])).start.job
    await deletion.mark(job_services, tenant, job)
    await gateway.audit.write(tenant, "job_delete", job=job)

    async def erase(run: RunId) -> None:
        try:
            await runs.erase(gateway, tenant, run)
        except NotFound:  # the job never created it
            pass

    await deletion.delete(job_services, tenant, job, erase)
    return JSONResponse({"status": "ok"})


async def _started(job_services: JobServices, listing: listings.JobListing) -> Started:
    started = await read(job_services.store, listing.start.started, Started)
    if started is None:
        raise InvalidField("job", listing.start.job, "a job that has started", "See its error in `knapper jobs show`")
    return started


async def _show(gateway: Services, tenant: Tenant, listing: listings.JobListing) -> Response:
    job_services = job_services_of(gateway)
    return JSONResponse(await listings.whole(job_services, tenant, listing.start.job, 10**9, gateway.presence))


def job_services_of(gateway: Services) -> JobServices:
    if gateway.job_services is None:
        raise Unavailable("this gateway has no exchange; its operator sets KNAPPER_EXCHANGE and KNAPPER_BROKER_URL")
    return gateway.job_services


ROUTES = [
    Door("/api/v1/jobs", submit, methods=["POST"], body_bytes_max=limits.body_bytes_max),
    Door("/api/v1/jobs", list_jobs, methods=["GET"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}", show, methods=["GET"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}", delete, methods=["DELETE"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}/cancel", cancel, methods=["POST"], body_bytes_max=0),
    Door("/api/v1/jobs/{job}/resume", resume, methods=["POST"], body_bytes_max=0),
]
