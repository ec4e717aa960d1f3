"""Doorbells: CloudEvents that say where to look in the store. Lost, repeated or reordered, they change nothing."""

import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import msgspec
from cloudevents.conversion import to_binary
from cloudevents.http import CloudEvent, from_http

from knapper import ids, limits
from knapper.errors import InvalidField, UserError
from knapper.ids import RunId
from knapper.state.journal.records import Commit
from knapper.wire.frames import frame, split
from knapper.wire.untrusted import parsing

OPERATIONS = "dev.knapper.run.operations"
JOB_STARTED = "dev.knapper.job.started"
ROLLOUTS_SAMPLED = "dev.knapper.rollouts.sampled"
ROLLOUTS_SCORED = "dev.knapper.rollouts.scored"
ROLLOUTS_ANSWERED = "dev.knapper.rollouts.answered"
ADAPTER_STEPPED = "dev.knapper.adapter.stepped"
JOB_COMPLETED = "dev.knapper.job.completed"
JOB_FAILED = "dev.knapper.job.failed"
JOB_CANCELLED = "dev.knapper.job.cancelled"
JOB_ENDED = (JOB_COMPLETED, JOB_FAILED, JOB_CANCELLED)
TICK = "dev.knapper.tick"
OBJECT_FINALIZED = "google.cloud.storage.object.v1.finalized"
FRAMES = "application/x-knapper-frames"

_STEP_DIGITS_MAX = 18
_READ = (
    "type", "source", "id", "subject", "step", "kind", "model", "traceparent", "signature", "holder", "epoch", "way",
)  # fmt: skip
_NAME = re.compile(r"[a-z0-9]{1,64}")
_NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")

Way = Literal["direct", "service", "lost"]
_WAYS = get_args(Way)


@dataclass(frozen=True)
class Hint:
    """The holder of the run in the newest manifest that the gateway has seen. For routing only.

    `way`: the doorbell goes to the holder itself (`direct`), to the service, or to the service because the holder is
    `lost`: it does not answer, or is shutting down.
    """

    holder: str = ""  # empty: unknown
    epoch: int = 0
    way: Way = "service"


@dataclass(frozen=True)
class Event:
    """A CloudEvent. The sender derives `id`, so that repetitions are recognised.

    `hint` is for OPERATIONS; `step`, `kind` (rl, sft, ...) and `model` (the slug of the base model) are of a job.
    Only storage events carry `data`.
    """

    type: str
    subject: str
    id: str
    source: str = "knapper/gateway"
    step: int | None = None
    kind: str = ""
    model: str = ""
    data: bytes = b""
    traceparent: str = ""
    signature: str = ""  # of the sender, for events that go through a Broker (knapper/events/function_key.py)
    hint: Hint = field(default_factory=Hint)

    def next(self, type_: str, source: str, step: int | None = None) -> "Event":
        """The next event; its id is derived, so that a repeated event has the same successor."""
        derived = hashlib.sha256(f"{self.id}|{type_}|{step}".encode()).hexdigest()[:32]
        return replace(self, type=type_, source=source, step=step, id=derived, data=b"", signature="")

    def encode(self) -> tuple[dict[str, str], bytes]:
        """Headers and body of the event in binary mode."""
        attributes = {"type": self.type, "source": self.source, "id": self.id}
        extensions = {
            "subject": self.subject,
            "step": "" if self.step is None else str(self.step),
            "kind": self.kind,
            "model": self.model,
            "traceparent": self.traceparent,
            "signature": self.signature,
            "datacontenttype": "application/json" if self.data else "",
        }
        if self.hint != Hint():
            extensions |= {"holder": self.hint.holder, "epoch": str(self.hint.epoch), "way": self.hint.way}
        attributes |= {name: value for name, value in extensions.items() if value}
        headers, body = to_binary(CloudEvent(attributes, data=self.data or None))
        return {str(name): str(value) for name, value in headers.items()}, body or b""


def is_event(headers: Mapping[str, str]) -> bool:
    """Whether the request is a CloudEvent, in binary or structured mode, and not a call."""
    return "ce-specversion" in headers or headers.get("content-type", "").startswith("application/cloudevents")


def decode(headers: Mapping[str, str], body: bytes) -> Event:
    """The event, in binary or structured mode. Raises UserError for anything else: a poison message."""
    with parsing(_no_event):
        event = from_http(dict(headers), body)
        attributes = event.get_attributes()
        data = event.get_data()
        content = b"" if data is None else data if isinstance(data, bytes) else msgspec.json.encode(data)
    for name in _READ:
        _check(name, attributes.get(name, ""))
    step, epoch = _number(attributes, "step"), _number(attributes, "epoch")
    way = attributes.get("way", "service")
    if way not in _WAYS:
        raise InvalidField("way", way, ", ".join(_WAYS))
    return Event(
        type=str(attributes["type"]),
        subject=str(attributes.get("subject", "")),
        id=str(attributes["id"]),
        source=str(attributes["source"]),
        step=step,
        kind=str(attributes.get("kind", "")),
        model=str(attributes.get("model", "")),
        data=content,
        traceparent=str(attributes.get("traceparent", "")),
        signature=str(attributes.get("signature", "")),
        hint=Hint(str(attributes.get("holder", "")), epoch or 0, way),
    )


def _number(attributes: Mapping[str, object], name: str) -> int | None:
    text = str(attributes.get(name, ""))
    if text and not (text.isdecimal() and text.isascii() and len(text) <= _STEP_DIGITS_MAX):
        raise InvalidField(name, text, f"a number of at most {_STEP_DIGITS_MAX} digits")
    return int(text) if text else None


def as_binary(headers: Mapping[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    """Any CloudEvent with all attributes in binary mode, `ce-` headers in lower case. Raises UserError otherwise."""
    with parsing(_no_event):
        event = from_http(dict(headers), body, data_unmarshaller=_untouched)
        binary_headers, data = to_binary(event)  # data: str or None if the event has it so
        content = str(data).encode() if isinstance(data, str) else data or b""  # type: ignore[redundant-expr]
    for name, value in event.get_attributes().items():
        if not _NAME.fullmatch(str(name)):
            raise InvalidField("the name of an attribute", name, "1 to 64 small letters and digits")
        _check(name, value)
    return {str(name).lower(): str(value) for name, value in binary_headers.items()}, content


def _no_event(error: Exception) -> UserError:
    return UserError(f"not a CloudEvent: {str(error)[:200]}")


def _check(name: str, value: object) -> None:
    """Raises InvalidField for a value that no header can carry."""
    chars_max = limits.event_attribute_chars_max
    if not isinstance(value, str | int) or len(str(value)) > chars_max or _NO_TEXT.search(str(value)):
        raise InvalidField(name, value, f"a string of at most {chars_max} characters, none of them a control character")


def _untouched(data: object) -> object:
    return data


def doorbell(run: RunId, id_: str, hint: Hint | None = None) -> Event:
    """The notification that `run` has pending operations."""
    return Event(type=OPERATIONS, subject=run, id=id_, hint=hint or Hint())


def run_of(event: Event) -> RunId:
    """The run of a doorbell. Raises UserError for another kind of event."""
    if event.type != OPERATIONS:
        raise UserError(f"event type is {event.type!r}; allowed: {OPERATIONS}")
    if not event.subject:
        raise UserError("the event has no subject; it names the run")
    return ids.run_id(event.subject)


class Claimed(msgspec.Struct, frozen=True, tag="claimed"):
    """The holder has the run, and its state is current. `address`: where it listens, or empty.

    `age_s`: the age of its process, 0 if unknown. `out`: the newest record; later ones follow in this stream. `stages`:
    seconds of the stages of the process's start that are over.
    """

    epoch: int
    holder: str = ""
    address: str = ""
    age_s: float = 0.0
    out: int = -1  # unknown
    stages: dict[str, float] = {}


class Committed(msgspec.Struct, frozen=True, tag="committed"):
    """Record `n` of the run is durable."""

    n: int
    commit: Commit


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The slice ended. `more`: operations may still be pending, so notify the holder again."""

    applied: int
    more: bool


Frame = Claimed | Committed | Done
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode_frame(message: Frame) -> bytes:
    """Encode a frame of train_step's response to a doorbell: a stream, as commits become durable."""
    return frame(_encoder.encode(message))


async def decode_frames(chunks: AsyncIterator[bytes]) -> AsyncIterator[Frame]:
    """The frames of a stream, each as soon as it is complete. A stream that breaks off just ends: its commits are
    durable all the same.
    """
    async for message in split(chunks):
        yield _decoder.decode(message)
