"""What callers of a process that does not start are told: soon, and by us, as it cannot say it itself."""

import asyncio
import socket
from contextlib import closing, suppress
from functools import partial

from knapper.errors import Unavailable
from knapper.local.web import BACKLOG
from knapper.web import connections

_CALLER_S = 5.0  # to send what it sends, and hear
_PIECE_BYTES = 65536


async def refuse(listener: socket.socket, error: Unavailable) -> None:
    """Answer with the error whoever waits on the listening socket, or comes before it may be tried again."""
    tell = partial(_tell, connections.encode_error(error))
    server = await asyncio.start_server(tell, sock=listener.dup(), backlog=BACKLOG)
    try:
        await asyncio.sleep(error.retry_after_s)
    finally:
        server.close()  # of our copy: who comes now waits in the kernel's queue


async def _tell(answer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with closing(writer), suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CALLER_S):
            await reader.read(_PIECE_BYTES)
            writer.write(answer)
            writer.write_eof()
            while await reader.read(_PIECE_BYTES):  # unread bytes would reset the connection, and lose the answer
                pass
