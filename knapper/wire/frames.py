"""Frames in a stream of bytes: 4 bytes of length, big-endian, then the message."""

from collections.abc import AsyncIterator

from knapper.errors import Corrupt

_FRAME_BYTES_MAX = 512 * 1024 * 1024


def frame(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


async def split(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The messages, each as soon as it is complete. A stream that breaks off just ends. Raises Corrupt."""
    buffer = bytearray()
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= 4:
            size = int.from_bytes(buffer[:4], "big")
            if size > _FRAME_BYTES_MAX:
                raise Corrupt(f"a frame of {size} bytes; at most {_FRAME_BYTES_MAX} are allowed")
            if len(buffer) < 4 + size:
                break
            message = bytes(buffer[4 : 4 + size])
            del buffer[: 4 + size]
            yield message
