"""Request bodies, bounded while they stream in: what is too large is thrown away as it comes, except its beginning."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from starlette.requests import Request

from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire import zstd

_SMALL_BYTES = 16 * 1024  # work on so few takes less time than it takes to give it to a thread
_PREFIX_BYTES = 256 * 1024  # two zstd blocks: enough for the first bytes of any content


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Body:
    """`data`, decompressed: all of it, or of a body over the limit only the beginning."""

    data: bytes
    whole: bool


async def read(request: Request) -> bytes:
    """The whole body. Raises TooLarge past the limit."""
    body = await read_or_peek(request)
    if not body.whole:
        raise too_large()
    return body.data


async def read_or_peek(request: Request) -> Body:
    """The body, or the beginning of one over the limit; all of it is off the wire, so that an answer is heard.

    Raises TooLarge for a body too long even to be read and thrown away, UserError for a broken encoding.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "zstd"):
        raise InvalidField("Content-Encoding", encoding, "zstd, or none")
    kept, whole = bytearray(), True
    size, size_max = 0, limits.body_bytes_max
    if encoding == "zstd":  # the limit is of the content, and what does not compress is longer on its way
        size_max += limits.body_bytes_max // 256 + 64
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.body_drain_bytes_max:
            raise too_large()
        if whole:
            kept += chunk
            if size > size_max:
                whole = False
                del kept[_PREFIX_BYTES:]
    data = bytes(kept)
    if encoding == "identity":
        return Body(data, whole)
    if not whole:
        return Body(await asyncio.to_thread(_beginning, data), False)
    if len(data) <= _SMALL_BYTES:
        content, cut = zstd.decompress_prefix(data, min(_SMALL_BYTES, limits.body_bytes_max))
        if not cut:
            return Body(content, True)
    content, cut = await asyncio.to_thread(zstd.decompress_prefix, data, limits.body_bytes_max)
    return Body(content[:_PREFIX_BYTES] if cut else content, not cut)


async def computed(size: int, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What the work returns, whose time grows with the `size` of a body: in a thread, unless it is small."""
    if size <= _SMALL_BYTES:
        return work(*arguments, **named)
    return await asyncio.to_thread(work, *arguments, **named)


def too_large() -> TooLarge:
    return TooLarge(
        f"the request's body is over {limits.body_bytes_max} bytes (after decompression); allowed: at most that; "
        "send fewer or shorter datums in one call"
    )


def _beginning(data: bytes) -> bytes:
    """Of a cut zstd frame, what comes out first; empty if nothing does."""
    try:
        return zstd.decompress_prefix(data, 4096)[0]
    except UserError:
        return b""
