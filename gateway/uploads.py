"""Uploads that nobody posts to us: pulled from the bucket's subscription, or found by looking into the bucket.

With a subscription a job starts seconds after its last file came. Without one (an emulator, another's bucket), the
inbox is listed now and then.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import structlog

from gateway import events as taking
from gateway.chores import Chore
from gateway.parts import Parts
from knapper import dead, events
from knapper.dead import DeadLetter
from knapper.errors import KnapperError, UserError
from knapper.events import Event
from knapper.exchange import Exchange

if TYPE_CHECKING:
    from knapper.pubsub import Message, Subscription

_LOOK_S = 10.0

log = structlog.get_logger()


def chores(gateway: Parts) -> list[Chore]:
    """What waits for uploads. A directory is watched by the broker's process; what it lost is found here."""
    if gateway.place is None:
        return []
    if gateway.subscription is not None:
        return [Chore("uploads", partial(pull, gateway, gateway.subscription), every_s=0.0)]
    return [Chore("inbox", Inbox(gateway, gateway.place.exchange).look, _LOOK_S, at_once=True)]


async def pull(gateway: Parts, source: "Subscription") -> None:
    """Take what the subscription has; a message is acknowledged once what it asks for is durable."""
    from knapper.pubsub import finalized

    messages = await source.pull()
    await source.acknowledge([each for each in messages if await _took(gateway, finalized, each)])


async def _took(gateway: Parts, read: "Callable[[Message], Event | None]", message: "Message") -> bool:
    """Whether the message is done with; poison becomes a dead letter."""
    try:
        event = read(message)
        if event is not None:
            await taking.uploaded(gateway, event)
    except UserError as error:
        why = {"knativeerrordest": "gateway", "knativeerrorcode": "422", "knativeerrordata": str(error)[:1000]}
        letter = DeadLetter({**message.attributes, "id": message.id, **why}, message.data, gateway.clock())
        log.warning("dead letter", name=await dead.keep(gateway.store, letter), reason=str(error))
    except KnapperError as error:
        log.warning("an upload waits", message=message.id, code=error.code, reason=str(error))
        return False
    return True


class Inbox:
    """The inbox, looked into."""

    def __init__(self, gateway: Parts, exchange: Exchange) -> None:
        self._gateway = gateway
        self._exchange = exchange
        self._known: set[tuple[str, str]] = set()

    async def look(self) -> None:
        """Take what is new since the last look that succeeded."""
        exchange = self._exchange
        found = await exchange.list("inbox/")
        for entry in found:
            if (entry.name, entry.generation) not in self._known:
                event = _event(exchange.bucket, exchange.prefix + entry.name, entry.generation)
                await taking.uploaded(self._gateway, event)
        self._known = {(entry.name, entry.generation) for entry in found}


def _event(bucket: str, name: str, generation: str) -> Event:
    data = msgspec.json.encode({"bucket": bucket, "name": name, "generation": generation})
    return Event(type=events.OBJECT_FINALIZED, subject=f"objects/{name}", id=f"{name}#{generation}", data=data)
