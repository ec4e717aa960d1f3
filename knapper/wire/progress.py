"""A sample that is told while it is drawn: the frames of a streamed answer of the sample function.

A frame for each token as it is drawn, then the whole answer, as if nobody had listened; or why there is none.
"""

from collections.abc import AsyncIterator
from typing import Literal

import msgspec

from knapper.frames import frame, split

FRAMES = "application/x-knapper-sample-frames"
Ending = Literal["", "stop", "length"]


class Drawn(msgspec.Struct, frozen=True, tag="drawn"):
    """Token number `position` of sequence number `sequence`. `ending`: why it is the last one, or empty.

    `logprob` and `alternatives`, likeliest first, as in the whole answer.
    """

    sequence: int
    position: int
    token: int
    logprob: float
    ending: Ending = ""
    alternatives: list[tuple[int, float]] = []


class Whole(msgspec.Struct, frozen=True, tag="whole"):
    """The protobuf answer."""

    answer: bytes


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """An error, in the words and with the status that the function would have answered at once."""

    status: int
    detail: str
    code: str
    category: str


Frame = Drawn | Whole | Failed
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


def encode(message: Frame) -> bytes:
    return frame(_encoder.encode(message))


async def decode(chunks: AsyncIterator[bytes]) -> AsyncIterator[Frame]:
    """The frames, each as soon as it is whole; a stream that breaks off just ends. Raises Corrupt."""
    async for message in split(chunks):
        yield _decoder.decode(message)
