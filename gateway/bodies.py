"""Request bodies, bounded while they stream in: of one over the limit, only the beginning is kept."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar, cast

from starlette.requests import Request

from gateway.routing import body_bytes_max, hold_of
from gateway.services import services_of
from gateway.tenants import tenant_of
from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire import zstd

_SMALL_BYTES = 64 * 1024  # decoding so few takes less time than handing them to a worker
_COPIED_BYTES = 2 * limits.MIB
_PREFIX_BYTES = 256 * 1024  # two zstd blocks: enough for the first bytes of any content


P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Body:
    """`data`, decompressed: the whole body, or only the beginning of one over the limit."""

    data: bytes
    whole: bool


async def read(request: Request) -> bytes:
    """The whole body. Raises TooLarge over the limit of its route, TooMany while other bodies use all the memory."""
    body = await read_or_peek(request)
    if not body.whole:
        raise too_large(request)
    return body.data


async def read_or_peek(request: Request) -> Body:
    """The body, or the beginning of one over the limit: enough of it is read that the client can read the response.

    Authenticates first: raises what `tenant_of` does. Raises UserError for a broken encoding, TooMany.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", "zstd"):
        raise InvalidField("Content-Encoding", encoding, "zstd, or none")
    hold_of(request.scope).open(services_of(request).body_budget, tenant_of(request))
    size_max = body_bytes_max(request)
    if encoding == "identity":
        return Body(*await _received(request, size_max))
    # The limit is on the content; incompressible content is slightly longer when encoded.
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
    """(bytes, whether they are the whole body); past `size_max` only the beginning is kept."""
    take, received, size = hold_of(request.scope).take, bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= size_max:
            take(len(chunk))
            received += chunk
            continue
        del received[_PREFIX_BYTES:]
        received += chunk[: _PREFIX_BYTES - len(received)]
        if size > size_max + limits.body_discarded_bytes_max:
            break
    whole = size <= size_max
    # Copying a large body would block the event loop. The cast is safe: nothing changes the bytearray from here on.
    return bytes(received) if len(received) <= _COPIED_BYTES else cast(bytes, received), whole


async def in_worker(
    request: Request, work: Callable[Concatenate[bytes, P], T], body: bytes, *args: P.args, **kwargs: P.kwargs
) -> T:
    """`work(body, *args)`, whose time grows with the body: in a worker process, unless the body is small.

    See `gateway.worker_pool` for what can be passed and returned.
    """
    if len(body) <= _SMALL_BYTES:
        return work(body, *args, **kwargs)
    return await services_of(request).worker_pool.run(tenant_of(request), work, body, *args, **kwargs)


async def in_thread(request: Request, size: int, work: Callable[[], T]) -> T:
    """`work()` in a thread, if it releases the interpreter's lock: for large bodies, one at a time per tenant."""
    if size <= _SMALL_BYTES:
        return await asyncio.to_thread(work)
    return await services_of(request).worker_pool.in_thread(tenant_of(request), work)


def too_large(request: Request) -> TooLarge:
    allowed = body_bytes_max(request)
    return TooLarge(
        f"the request's body is over {allowed} bytes (after decompression); allowed at {request.url.path}: at most "
        "that; send less in one request"
    )


def _beginning(data: bytes) -> bytes:
    """The first bytes of a truncated zstd frame, decompressed; empty if there are none."""
    try:
        return zstd.decompress_prefix(data, 4096)[0]
    except UserError:
        return b""
