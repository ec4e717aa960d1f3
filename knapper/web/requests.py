"""Requests of all servers: read a bounded body, and cancel the work for a caller that hung up."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from knapper.errors import TooLarge

T = TypeVar("T")


async def body(request: Request, bytes_max: int) -> bytes:
    """The whole body. Raises TooLarge over the limit, without reading on."""
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > bytes_max:
            raise TooLarge(f"the body has more than {bytes_max} bytes; allowed: {bytes_max}")
    return bytes(received)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`. If the caller hangs up, cancels it and raises ClientDisconnect.

    The request's body must have been read, so that nothing else can come.
    """
    result = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((result, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        for task in (result, disconnect):
            task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
