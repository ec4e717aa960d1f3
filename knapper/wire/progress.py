"""Streamed samples: the frames of a streaming response of the sample function.

One frame for each token as it is drawn, then one with the complete response, as without streaming, or with an error.
"""

import re
from collections.abc import AsyncIterator
from math import inf
from typing import Final, Literal

import msgspec
import structlog

from knapper.wire.frames import frame, split

FRAMES = "application/x-knapper-sample-frames"
DEVICE_S: Final = "Knapper-Device-Seconds"  # a header of responses without a stream: for this sample
SAMPLER: Final = "Knapper-Sampler"  # a header of all responses: backend and dtype
_SAMPLER = re.compile(r"[a-z]{1,16} [a-z0-9]{1,16}")
log = structlog.get_logger()
Ending = Literal["", "stop", "length"]


class TokenEvent(msgspec.Struct, frozen=True, tag="drawn"):
    """Token number `position` of sequence number `sequence`. `ending`: the stop reason of a last token, or empty.

    `logprob` and `alternatives`, likeliest first, as in the complete response.
    """

    sequence: int
    position: int
    token: int
    logprob: float
    ending: Ending = ""
    alternatives: list[tuple[int, float]] = []


class FinishedEvent(msgspec.Struct, frozen=True, tag="whole"):
    """The protobuf response, and its device seconds."""

    answer: bytes
    device_s: float = 0.0


class FailedEvent(msgspec.Struct, frozen=True, tag="failed"):
    """An error, with the message and status that the function would respond with."""

    status: int
    detail: str
    code: str
    category: str
    field: str | None = None  # the wrong field, if it is one


StreamEvent = TokenEvent | FinishedEvent | FailedEvent


def device_s(header: str | None) -> float:
    """The value of the header DEVICE_S, 0 without it, as from an older function; a bad value is logged."""
    try:
        seconds = float(header or 0.0)
    except ValueError:
        seconds = inf
    if 0.0 <= seconds < inf:
        return seconds
    log.error("a sample's device seconds cannot be counted", header=header)
    return 0.0


def sampler(header: str) -> str:
    """The value of the header SAMPLER; empty for anything else, as it becomes a label of a metric."""
    return header if _SAMPLER.fullmatch(header) else ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(StreamEvent)


def encode(message: StreamEvent) -> bytes:
    return frame(_encoder.encode(message))


async def decode(chunks: AsyncIterator[bytes]) -> AsyncIterator[StreamEvent]:
    """The events, each as soon as its frame is complete; a stream that breaks off just ends. Raises Corrupt."""
    async for message in split(chunks):
        yield _decoder.decode(message)
