"""A sample that is told while it is drawn: the frames of a streamed answer of the sample function.

A frame for each token as it is drawn, then the whole answer, as if nobody had listened; or why there is none.
"""

from collections.abc import AsyncIterator
from math import inf
from typing import Final, Literal

import msgspec
import structlog

from knapper.wire.frames import frame, split

FRAMES = "application/x-knapper-sample-frames"
DEVICE_S: Final = "Knapper-Device-Seconds"  # a header of an answer that is no stream: of the device, for this sample
log = structlog.get_logger()
Ending = Literal["", "stop", "length"]


class TokenEvent(msgspec.Struct, frozen=True, tag="drawn"):
    """Token number `position` of sequence number `sequence`. `ending`: why it is the last one, or empty.

    `logprob` and `alternatives`, likeliest first, as in the whole answer.
    """

    sequence: int
    position: int
    token: int
    logprob: float
    ending: Ending = ""
    alternatives: list[tuple[int, float]] = []


class FinishedEvent(msgspec.Struct, frozen=True, tag="whole"):
    """The protobuf answer, and the seconds of the device that it took."""

    answer: bytes
    device_s: float = 0.0


class FailedEvent(msgspec.Struct, frozen=True, tag="failed"):
    """An error, in the words and with the status that the function would have answered at once."""

    status: int
    detail: str
    code: str
    category: str
    field: str | None = None  # the one that is wrong, where it is one


StreamEvent = TokenEvent | FinishedEvent | FailedEvent


def device_s(header: str | None) -> float:
    """What DEVICE_S says. Without it, as from a function of an older release, 0; what is no such number is logged."""
    try:
        seconds = float(header or 0.0)
    except ValueError:
        seconds = inf
    if 0.0 <= seconds < inf:
        return seconds
    log.error("a sample's device seconds cannot be counted", header=header)
    return 0.0


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StreamEvent)


def encode(message: StreamEvent) -> bytes:
    return frame(_encoder.encode(message))


async def decode(chunks: AsyncIterator[bytes]) -> AsyncIterator[StreamEvent]:
    """The frames, each as soon as it is whole; a stream that breaks off just ends. Raises Corrupt."""
    async for message in split(chunks):
        yield _decoder.decode(message)
