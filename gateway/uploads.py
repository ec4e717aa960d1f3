"""Uploads that nobody posts to us: pulled from the bucket's subscription, or found by looking into the bucket.

With a subscription a job starts seconds after its last file came. Without one (an emulator, another's bucket), the
inbox is listed now and then.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import msgspec
import structlog

from gateway import events as taking
from gateway.parts import Parts
from knapper import dead, events
from knapper.dead import DeadLetter
from knapper.errors import KnapperError, UserError
from knapper.events import Event

if TYPE_CHECKING:
    from knapper.pubsub import Message

_LOOK_S = 10.0
_AGAIN_S = 5.0

log = structlog.get_logger()


async def pulled(gateway: Parts, subscription: str) -> NoReturn:
    """For ever: take what the subscription has; a message is acknowledged once what it asks for is durable."""
    from knapper import pubsub  # its client takes half a second to import, and few gateways need it

    source = pubsub.Subscription(subscription)
    try:
        while True:
            try:
                messages = await source.pull()
                await source.acknowledge([each for each in messages if await _took(gateway, pubsub.finalized, each)])
            except KnapperError as error:
                log.warning("uploads are not heard of", code=error.code, reason=str(error))
                await asyncio.sleep(_AGAIN_S)
    finally:
        source.close()


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


async def looked_for(gateway: Parts) -> NoReturn:
    """For ever: find what is new in the inbox."""
    assert gateway.place is not None
    exchange = gateway.place.exchange
    known: set[tuple[str, str]] = set()
    while True:
        try:
            found = await exchange.list("inbox/")
            for entry in found:
                if (entry.name, entry.generation) not in known:
                    await taking.uploaded(
                        gateway, _event(exchange.bucket, exchange.prefix + entry.name, entry.generation)
                    )
            known = {(entry.name, entry.generation) for entry in found}
        except KnapperError as error:
            log.warning("the inbox cannot be looked into", code=error.code, reason=str(error))
        await asyncio.sleep(_LOOK_S)


def _event(bucket: str, name: str, generation: str) -> Event:
    data = msgspec.json.encode({"bucket": bucket, "name": name, "generation": generation})
    return Event(type=events.OBJECT_FINALIZED, subject=f"objects/{name}", id=f"{name}#{generation}", data=data)
