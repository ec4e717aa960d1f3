"""What all our servers do with a request: read a bounded body, and end the work for a caller who has hung up."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from knapper.errors import TooLarge

T = TypeVar("T")


async def body(request: Request, bytes_max: int) -> bytes:
    """The whole body. Raises TooLarge past the limit, without reading on."""
    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > bytes_max:
            raise TooLarge(f"the body has more than {bytes_max} bytes; allowed: {bytes_max}")
    return bytes(received)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """What the work returns; it is cancelled when the caller hangs up. Raises ClientDisconnect then.

    The request's body must have been read, so that nothing else can come.
    """
    working = asyncio.ensure_future(work)
    hung_up = asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((working, hung_up), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for waiting in (working, hung_up):
            waiting.cancel()


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
