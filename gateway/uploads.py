"""Uploads that nobody posts to us: pulled from the bucket's subscription, or found by looking into the bucket.

With a subscription a job starts seconds after its last file came. Without one (an emulator, another's bucket), the
inbox is listed: every ten seconds while files come, and ever less often, down to every five minutes, while none do.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import structlog

from gateway import events as taking
from gateway.periodic import Chore
from gateway.services import Services
from knapper.errors import KnapperError, Unavailable, UserError
from knapper.events.cloudevents import Event
from knapper.ids import Tenant
from knapper.jobs import upload
from knapper.jobs.services import JobServices
from knapper.state import damage, dead_letters, layout
from knapper.state.dead_letters import DeadLetter

if TYPE_CHECKING:
    from knapper.events.pubsub import PubsubMessage, Subscription

_LOOK_S, _LOOK_REST_S = 10.0, 300.0

log = structlog.get_logger()


def chores(gateway: Services) -> list[Chore]:
    """What waits for uploads. A directory is watched by the broker's process; what it lost is found here."""
    if gateway.place is None:
        return []
    if gateway.subscription is not None:
        return [Chore("uploads", partial(pull, gateway, gateway.subscription), every_s=0.0)]
    return [Chore("inbox", Inbox(gateway, gateway.place).look, _LOOK_S, at_once=True, stirred=gateway.stirs.inbox)]


async def pull(gateway: Services, source: "Subscription") -> None:
    """Take what the subscription has; a message is acknowledged once what it asks for is durable."""
    from knapper.events.pubsub import finalized

    messages = await source.pull()
    await source.acknowledge([each for each in messages if await _took(gateway, finalized, each)])


async def _took(gateway: Services, read: "Callable[[PubsubMessage], Event | None]", message: "PubsubMessage") -> bool:
    """Whether the message is done with; poison becomes a dead letter."""
    try:
        event = read(message)
        if event is not None:
            await taking.uploaded(gateway, event)
    except UserError as error:
        why = {"knativeerrordest": "gateway", "knativeerrorcode": "422", "knativeerrordata": str(error)[:1000]}
        letter = DeadLetter({**message.attributes, "id": message.id, **why}, message.data, gateway.clock())
        log.warning("dead letter", name=await dead_letters.keep(gateway.store, letter), reason=str(error))
    except KnapperError as error:
        log.warning("an upload waits", message=message.id, code=error.code, reason=str(error))
        return False
    except Exception:  # a border: the others that came with it are not to blame
        log.exception("an upload: defect", message=message.id)
        return False
    return True


class Inbox:
    """The inbox of a gateway that nobody tells of uploads, or not of all."""

    def __init__(self, gateway: Services, place: JobServices) -> None:
        self._gateway = gateway
        self._place = place
        self._known: set[tuple[str, str]] = set()

    async def look(self) -> float | None:
        """Take what is new since the last look that succeeded: each folder once, and none whose job has started."""
        found = await self._place.exchange.list(layout.INBOX)
        new = [entry for entry in found if (entry.name, entry.generation) not in self._known]
        for tenant, job in dict.fromkeys(folder for entry in new if (folder := taking.folder_of(entry.name))):
            inbox = layout.inbox(tenant, job)
            there = {each.name.removeprefix(inbox): each.generation for each in found if each.name.startswith(inbox)}
            if not await damage.unless(upload.unchanged(self._place.store, tenant, job, there), False):
                await self._start(tenant, job)
        self._known = {(entry.name, entry.generation) for entry in found}
        return None if new else _LOOK_REST_S

    async def _start(self, tenant: Tenant, job: str) -> None:
        """What is wrong with one folder stops no other, and is looked at again when something comes into it."""
        try:
            await taking.started(self._gateway, self._place, tenant, job)
        except Unavailable:
            raise
        except damage.ERRORS as error:
            damage.report(error)
        except Exception:
            log.exception("a folder of the inbox: defect", tenant=tenant, job=job)
