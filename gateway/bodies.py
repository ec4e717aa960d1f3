"""Request bodies, bounded while they stream in: what is too large is thrown away as it comes, except its beginning."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar, cast

from starlette.requests import Request

from gateway.routing import body_bytes_max, hold_of
from gateway.services import parts
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire import zstd

_SMALL_BYTES = 64 * 1024  # work on so few takes less time than it takes to give it away
_COPIED_BYTES = 2 * limits.MIB
_PREFIX_BYTES = 256 * 1024  # two zstd blocks: enough for the first bytes of any content


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Body:
    """`data`, decompressed: all of it, or of a body over the limit only the beginning."""

    data: bytes
    whole: bool


async def read(request: Request) -> bytes:
    """The whole body. Raises TooLarge past the limit of its route, TooMany while others take all memory for bodies."""
    body = await read_or_peek(request)
    if not body.whole:
        raise too_large(request)
    return body.data


async def read_or_peek(request: Request) -> Body:
    """The body, or the beginning of one over the limit, of which so much is off the wire that an answer is heard.

    Only for whoever may be here: raises what `tenant_of` does. Raises UserError for a broken encoding, TooMany.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "zstd"):
        raise InvalidField("Content-Encoding", encoding, "zstd, or none")
    hold_of(request.scope).open(parts(request).budget, tenant_of(request))
    size_max = body_bytes_max(request)
    if encoding == "identity":
        return Body(*await _received(request, size_max))
    # The limit is of the content, and what does not compress is longer on its way.
    data, whole = await _received(request, size_max + size_max // 256 + 64)
    if not whole:
        return Body(await asyncio.to_thread(_beginning, data), False)
    take = hold_of(request.scope).take
    if len(data) <= _SMALL_BYTES:
        content, cut = zstd.decompress_prefix(data, min(_SMALL_BYTES, size_max), take)
        if not cut:
            return Body(content, True)
    content, cut = await asyncio.to_thread(zstd.decompress_prefix, data, size_max, take)
    return Body(content[:_PREFIX_BYTES] if cut else content, not cut)


async def _received(request: Request, size_max: int) -> tuple[bytes, bool]:
    """(what came, whether that is all); past `size_max` only the beginning is kept."""
    take, kept, size = hold_of(request.scope).take, bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= size_max:
            take(len(chunk))
            kept += chunk
            continue
        del kept[_PREFIX_BYTES:]
        kept += chunk[: _PREFIX_BYTES - len(kept)]
        if size > size_max + limits.body_discarded_bytes_max:
            break
    whole = size <= size_max
    # A large one is not copied, which everybody would wait for: nothing changes it from here on.
    return bytes(kept) if len(kept) <= _COPIED_BYTES else cast(bytes, kept), whole


async def computed(
    request: Request, work: Callable[Concatenate[bytes, P], T], body: bytes, *given: P.args, **named: P.kwargs
) -> T:
    """What the work returns, whose time grows with the body: in a process of its own, unless it is small.

    See `gateway.worker_pool` for what may be given and returned.
    """
    if len(body) <= _SMALL_BYTES:
        return work(body, *given, **named)
    return await parts(request).workers.run(tenant_of(request), work, body, *given, **named)


async def aside(request: Request, size: int, work: Callable[[], T]) -> T:
    """The same in a thread, for work that lets go of the interpreter's lock: of large bodies one a tenant."""
    if size <= _SMALL_BYTES:
        return await asyncio.to_thread(work)
    return await parts(request).workers.aside(tenant_of(request), work)


def too_large(request: Request) -> TooLarge:
    allowed = body_bytes_max(request)
    return TooLarge(
        f"the request's body is over {allowed} bytes (after decompression); allowed at {request.url.path}: at most "
        "that; send less in one request"
    )


def _beginning(data: bytes) -> bytes:
    """Of a cut zstd frame, what comes out first; empty if nothing does."""
    try:
        return zstd.decompress_prefix(data, 4096)[0]
    except UserError:
        return b""
