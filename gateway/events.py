"""CloudEvents for the gateway: uploads into the inbox, ended jobs, the tick, and dead letters.

They are accepted from the cluster's own services only, under a host name that no ingress serves (docs/decisions/0008).
Their content is not trusted: an upload makes the gateway list the inbox, a tick read the store.
"""

from typing import Final

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from gateway import origins, periodic_tasks
from gateway.routing import Door, body_bytes_max
from gateway.services import Services, services_of
from gateway.tenants import on_this_machine
from knapper import ids, limits
from knapper.errors import InvalidField, NotFound, Unavailable, UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs import names, revive
from knapper.jobs.inbox import look
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.jobs.sweep import dispatch
from knapper.observability import traces
from knapper.state import dead_letters, layout
from knapper.state.dead_letters import DeadLetter
from knapper.web import requests
from knapper.wire import json

_TICKS: Final = (cloudevents.TICK, "dev.knative.sources.ping")  # a PingSource cannot choose its event's type

log = structlog.get_logger()


class Finalized(msgspec.Struct, frozen=True):
    """The fields of a finalized object that the gateway reads."""

    bucket: str
    name: str


async def receive(request: Request) -> Response:
    """204 once the event's effect is durable; 422 for an event that can have none."""
    _expect_internal(request)
    event = cloudevents.decode(request.headers, await requests.body(request, body_bytes_max(request)))
    with traces.span("gateway", event.traceparent, subject=event.subject):  # its doorbells belong to this trace
        if event.type in _TICKS:
            await periodic_tasks.jobs(services_of(request))
        elif event.type == cloudevents.OBJECT_FINALIZED:
            await start_uploaded_job(services_of(request), event)
        elif event.type in cloudevents.JOB_ENDED:
            await go_on_with_sweep(services_of(request), event)
        else:
            allowed = ", ".join((*_TICKS, cloudevents.OBJECT_FINALIZED, *cloudevents.JOB_ENDED))
            raise InvalidField("type", event.type, allowed)
    return Response(status_code=204)


async def store_dead_letter(request: Request) -> Response:
    """Store an undeliverable event, valid or not: this is the last stop, so nothing else would keep it."""
    _expect_internal(request)
    body = await requests.body(request, body_bytes_max(request))
    attributes = {
        name.removeprefix("ce-"): value[: limits.event_attribute_chars_max]
        for name, value in sorted(request.headers.items())
        if name.startswith("ce-") or name == "content-type"
    }
    gateway = services_of(request)
    name = await dead_letters.keep(gateway.store, DeadLetter(attributes, body, gateway.clock()))
    log.warning("dead letter", name=name, **{key: attributes.get(key, "")[:200] for key in ("type", "subject", "id")})
    return Response(status_code=204)


async def start_uploaded_job(gateway: Services, event: Event) -> None:
    """Start the job whose inbox folder received the object, if it can start."""
    job_services = gateway.job_services
    if job_services is None:
        raise Unavailable("this gateway has no exchange")
    upload = json.decode(event.data, Finalized)
    if upload.bucket != job_services.exchange.bucket:
        raise InvalidField("bucket", upload.bucket, repr(job_services.exchange.bucket))
    folder = folder_of(upload.name.removeprefix(job_services.exchange.prefix))
    if folder is not None:  # a job starts once, however many events its files cause
        await start_job(gateway, job_services, *folder)


async def start_job(gateway: Services, job_services: JobServices, tenant: ids.Tenant, job: str) -> None:
    """Start the job of this inbox folder if it can start, and post its first event."""
    start = await look(job_services, tenant, job)
    gateway.wakeups.jobs.set()
    gateway.wakeups.inbox.set()  # more files may follow
    for event in [] if start is None else await revive.first(job_services, start):
        await job_services.notifier.post(event)


async def go_on_with_sweep(gateway: Services, event: Event) -> None:
    """A job has ended: if it is a trial of a sweep, let that go on."""
    job_services = gateway.job_services
    if job_services is None:
        raise Unavailable("this gateway has no exchange")
    for rung in await dispatch.go_on_after(job_services, Start.parse(event.subject)):
        gateway.wakeups.jobs.set()
        await job_services.notifier.post(rung)


def folder_of(name: str) -> tuple[ids.Tenant, str] | None:
    """(tenant, job) of an object in a job's inbox folder; None for any other, and for the gateway's own error file."""
    path = name.removeprefix(layout.INBOX).split("/")
    if not name.startswith(layout.INBOX) or len(path) != 3 or path[2] == names.JOB_ERROR:
        return None
    try:
        return ids.tenant(path[0]), names.chosen(path[1])
    except UserError:
        log.info("an upload into a folder that no job can have", name=name[:200])
        return None


def _expect_internal(request: Request) -> None:
    """Raises NotFound for a request from outside the cluster, or from a web page: its browser sends `Origin`, or cannot
    send the headers of an event."""
    host = request.headers.get("host", "")
    expected = services_of(request).events_host
    internal = (
        host.rpartition(":")[0] == expected or host == expected
        if expected
        else on_this_machine(request) and origins.is_loopback(origins.name_of(host))
    )
    if not internal or "origin" in request.headers or not cloudevents.is_event(request.headers):
        raise NotFound(f"there is nothing at {request.url.path}")


ROUTES: Final = [
    Door("/events", receive, methods=["POST"], body_bytes_max=limits.event_bytes_max),
    Door("/events/dead", store_dead_letter, methods=["POST"], body_bytes_max=limits.event_bytes_max),
]
