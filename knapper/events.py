"""Doorbells: CloudEvents that say "look at the store". Lost, repeated or reordered, they change nothing."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import msgspec
from cloudevents.conversion import to_binary
from cloudevents.exceptions import GenericException
from cloudevents.http import CloudEvent, from_http

from knapper import ids
from knapper.errors import UserError
from knapper.frames import frame, split
from knapper.ids import RunId
from knapper.journal.records import Commit

OPERATIONS = "dev.knapper.run.operations"
FRAMES = "application/x-knapper-frames"


@dataclass(frozen=True)
class Bell:
    """Work waits for `run`. `id` is derived by whoever rings, so that repetitions can be told."""

    run: RunId
    id: str

    def encode(self) -> tuple[dict[str, str], bytes]:
        """Headers and body of a binary-mode CloudEvent over HTTP."""
        attributes = {"type": OPERATIONS, "source": "knapper/gateway", "subject": self.run, "id": self.id}
        headers, body = to_binary(CloudEvent(attributes, data=None))
        return {str(name): str(value) for name, value in headers.items()}, body or b""


def decode(headers: Mapping[str, str], body: bytes) -> Bell:
    """The bell. Raises UserError for anything that is not one (it goes to the dead letters)."""
    try:
        event = from_http(dict(headers), body)
    except GenericException as error:
        raise UserError(f"not a CloudEvent: {error}") from error
    if event["type"] != OPERATIONS:
        raise UserError(f"event type is {event['type']!r}; allowed: {OPERATIONS}")
    subject = event.get_attributes().get("subject")
    if not isinstance(subject, str):
        raise UserError("the event has no subject; it names the run")
    return Bell(run=ids.run_id(subject), id=str(event["id"]))


class Claimed(msgspec.Struct, frozen=True, tag="claimed"):
    """The holder has the run; its state is current."""

    epoch: int


class Committed(msgspec.Struct, frozen=True, tag="committed"):
    """Record `n` of the run is durable."""

    n: int
    commit: Commit


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The slice ended. `more`: something may still wait, ring again."""

    applied: int
    more: bool


Frame = Claimed | Committed | Done
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode_frame(message: Frame) -> bytes:
    """A train_step answers a bell with a stream of these, as things become durable."""
    return frame(_encoder.encode(message))


async def decode_frames(chunks: AsyncIterator[bytes]) -> AsyncIterator[Frame]:
    """The frames of a stream, each as soon as it is whole.

    A stream that breaks off just ends: what it said is durable all the same.
    """
    async for message in split(chunks):
        yield _decoder.decode(message)
