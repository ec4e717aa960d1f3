"""Messages in a stream of bytes: 4 bytes of length, big-endian, then so many bytes."""

from collections.abc import AsyncIterator

from knapper.errors import Corrupt

_FRAME_BYTES_MAX = 512 * 1024 * 1024


def frame(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


async def split(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The messages, each as soon as it is whole. A stream that breaks off just ends. Raises Corrupt."""
    waiting = bytearray()
    async for chunk in chunks:
        waiting += chunk
        while len(waiting) >= 4:
            size = int.from_bytes(waiting[:4], "big")
            if size > _FRAME_BYTES_MAX:
                raise Corrupt(f"a frame of {size} bytes; at most {_FRAME_BYTES_MAX} are allowed")
            if len(waiting) < 4 + size:
                break
            message = bytes(waiting[4 : 4 + size])
            del waiting[: 4 + size]
            yield message
