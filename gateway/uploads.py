"""Uploads without an event: pulled from the bucket's subscription, or found by listing the inbox.

With a subscription a job starts seconds after its last file arrives. Without one (an emulator, another's bucket), the
inbox is listed: every ten seconds while files arrive, and ever less often, down to every five minutes, while none do.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog

from gateway import events
from gateway.periodic import PeriodicTask
from gateway.services import Services
from knapper import limits
from knapper.errors import KnapperError, Unavailable, UserError
from knapper.events.cloudevents import Event
from knapper.ids import Tenant
from knapper.jobs import upload
from knapper.jobs.services import JobServices
from knapper.state import damage, dead_letters, layout
from knapper.state.dead_letters import DeadLetter

if TYPE_CHECKING:
    from knapper.events.pubsub import PubsubMessage, Subscription

_LOOK_S = 10.0

log = structlog.get_logger()


def tasks(gateway: Services) -> list[PeriodicTask]:
    """The tasks that find uploads. The local broker watches a directory; uploads that it missed are found here."""
    if gateway.job_services is None:
        return []
    if gateway.subscription is not None:
        return [PeriodicTask("uploads", partial(pull, gateway, gateway.subscription), every_s=0.0)]
    inbox = Inbox(gateway, gateway.job_services)
    return [PeriodicTask("inbox", inbox.look, _LOOK_S, at_once=True, doorbell=gateway.wakeups.inbox)]


async def pull(gateway: Services, subscription: "Subscription") -> None:
    """Handle the subscription's messages, and acknowledge each once its effect is durable."""
    from knapper.events.pubsub import finalized

    messages = await subscription.pull()
    await subscription.acknowledge([message for message in messages if await _handle(gateway, finalized, message)])


async def _handle(gateway: Services, read: "Callable[[PubsubMessage], Event | None]", message: "PubsubMessage") -> bool:
    """Whether the message can be acknowledged; a poison message becomes a dead letter."""
    try:
        event = read(message)
        if event is not None:
            await events.start_uploaded_job(gateway, event)
    except UserError as error:
        failure = {"knativeerrordest": "gateway", "knativeerrorcode": "422", "knativeerrordata": str(error)[:1000]}
        letter = DeadLetter({**message.attributes, "id": message.id, **failure}, message.data, gateway.clock())
        log.warning("dead letter", name=await dead_letters.keep(gateway.store, letter), reason=str(error))
    except KnapperError as error:
        log.warning("an upload waits", message=message.id, code=error.code, reason=str(error))
        return False
    except Exception:  # the other messages are still handled
        log.exception("an upload: defect", message=message.id)
        return False
    return True


class Inbox:
    """Finds uploads by listing the inbox."""

    def __init__(self, gateway: Services, job_services: JobServices) -> None:
        self._gateway = gateway
        self._job_services = job_services
        self._known: set[tuple[str, str]] = set()

    async def look(self) -> float | None:
        """Start the jobs of folders with new files since the last success, except those that have started."""
        entries = await self._job_services.exchange.list(layout.INBOX)
        new = [entry for entry in entries if (entry.name, entry.generation) not in self._known]
        for tenant, job in dict.fromkeys(folder for entry in new if (folder := events.folder_of(entry.name))):
            inbox = layout.inbox(tenant, job)
            files = {
                entry.name.removeprefix(inbox): entry.generation for entry in entries if entry.name.startswith(inbox)
            }
            if not await damage.unless(upload.unchanged(self._job_services.store, tenant, job, files), False):
                await self._start(tenant, job)
        self._known = {(entry.name, entry.generation) for entry in entries}
        return None if new else limits.job_inbox_look_s

    async def _start(self, tenant: Tenant, job: str) -> None:
        """An invalid folder does not stop the others; it is tried again when another file arrives in it."""
        try:
            await events.start_job(self._gateway, self._job_services, tenant, job)
        except Unavailable:
            raise
        except damage.ERRORS as error:
            damage.report(error)
        except Exception:
            log.exception("a folder of the inbox: defect", tenant=tenant, job=job)
