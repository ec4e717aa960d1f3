"""Request bodies, bounded while they stream in: what is too large is thrown away as it comes, except its beginning."""

import asyncio
from dataclasses import dataclass

from starlette.requests import Request

from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire import zstd

_PREFIX_BYTES = 256 * 1024  # two zstd blocks: enough for the first bytes of any content


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
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.body_drain_bytes_max:
            raise too_large()
        if whole:
            kept += chunk
            if size > limits.body_bytes_max:
                whole = False
                del kept[_PREFIX_BYTES:]
    data = bytes(kept)
    if encoding == "identity":
        return Body(data, whole)
    if not whole:
        return Body(await asyncio.to_thread(_beginning, data), False)
    content, cut = await asyncio.to_thread(zstd.decompress_prefix, data, limits.body_bytes_max)
    return Body(content[:_PREFIX_BYTES] if cut else content, not cut)


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
