"""CloudEvents for the gateway: uploads into the inbox, the tick, and letters that nobody could deliver.

They are taken from the cluster's own services only, under a name that no ingress serves (docs/decisions/0008). Nothing
in them is believed: an upload makes the gateway look into the inbox, a tick into the store.
"""

from typing import Final

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

from gateway import origins, periodic_tasks
from gateway.routing import Door, body_bytes_max
from gateway.services import Services, parts
from gateway.tenants import on_this_machine
from knapper import ids, limits
from knapper.errors import InvalidField, NotFound, Unavailable, UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs import names, revive
from knapper.jobs.inbox import look
from knapper.jobs.services import JobServices
from knapper.observability import traces
from knapper.state import dead_letters, layout
from knapper.state.dead_letters import DeadLetter
from knapper.web import requests
from knapper.wire import json

_TICKS: Final = (cloudevents.TICK, "dev.knative.sources.ping")  # a PingSource cannot choose its event's type

log = structlog.get_logger()


class Finalized(msgspec.Struct, frozen=True):
    """What is read of an object's data; there is more of it."""

    bucket: str
    name: str


async def take(request: Request) -> Response:
    """204 once what the event asks for is durable; 422 for one that never will be."""
    _expect_insider(request)
    event = cloudevents.decode(request.headers, await requests.body(request, body_bytes_max(request)))
    with traces.span("gateway", event.traceparent, subject=event.subject):  # what it rings for belongs to this trace
        if event.type in _TICKS:
            await periodic_tasks.jobs(parts(request))
        elif event.type == cloudevents.OBJECT_FINALIZED:
            await uploaded(parts(request), event)
        else:
            allowed = ", ".join((*_TICKS, cloudevents.OBJECT_FINALIZED))
            raise InvalidField("type", event.type, allowed)
    return Response(status_code=204)


async def bury(request: Request) -> Response:
    """Keep a letter that could not be delivered, whatever it is: there is nobody behind us who would."""
    _expect_insider(request)
    body = await requests.body(request, body_bytes_max(request))
    attributes = {
        name.removeprefix("ce-"): value[: limits.event_attribute_chars_max]
        for name, value in sorted(request.headers.items())
        if name.startswith("ce-") or name == "content-type"
    }
    gateway = parts(request)
    name = await dead_letters.keep(gateway.store, DeadLetter(attributes, body, gateway.clock()))
    log.warning("dead letter", name=name, **{key: attributes.get(key, "")[:200] for key in ("type", "subject", "id")})
    return Response(status_code=204)


async def uploaded(gateway: Services, event: Event) -> None:
    """Look at the folder that the object came into, and ring for the job that starts with it."""
    if gateway.place is None:
        raise Unavailable("this gateway has no exchange")
    found = json.decode(event.data, Finalized)
    if found.bucket != gateway.place.exchange.bucket:
        raise InvalidField("bucket", found.bucket, repr(gateway.place.exchange.bucket))
    folder = folder_of(found.name.removeprefix(gateway.place.exchange.prefix))
    if folder is not None:  # a job starts once, however often anybody hears of its files
        await started(gateway, gateway.place, *folder)


async def started(gateway: Services, place: JobServices, tenant: ids.Tenant, job: str) -> None:
    """Start the job of this folder if it can be, and ring for it."""
    start = await look(place, tenant, job)
    gateway.stirs.jobs.set()
    gateway.stirs.inbox.set()  # who uploads one file uploads more
    if start is not None:
        await place.notifier.post(await revive.first(place, start))


def folder_of(name: str) -> tuple[ids.Tenant, str] | None:
    """(tenant, job) of an object in somebody's folder of the inbox; None for any other, and for what we put there."""
    rest = name.removeprefix(layout.INBOX).split("/")
    if not name.startswith(layout.INBOX) or len(rest) != 3 or rest[2] == names.JOB_ERROR:
        return None
    try:
        return ids.tenant(rest[0]), names.job(rest[1])
    except UserError:
        log.info("an upload into a folder that no job can have", name=name[:200])
        return None


def _expect_insider(request: Request) -> None:
    """Raises NotFound: outside, this route does not exist. Nor for a page: its browser says where it is from, or sends
    no header that makes an event."""
    host = request.headers.get("host", "")
    expected = parts(request).events_host
    inside = (
        host.rpartition(":")[0] == expected or host == expected
        if expected
        else on_this_machine(request) and origins.is_loopback(origins.name_of(host))
    )
    if not inside or "origin" in request.headers or not cloudevents.sent(request.headers):
        raise NotFound(f"there is nothing at {request.url.path}")


ROUTES: Final = [
    Door("/events", take, methods=["POST"], body_bytes_max=limits.event_bytes_max),
    Door("/events/dead", bury, methods=["POST"], body_bytes_max=limits.event_bytes_max),
]
