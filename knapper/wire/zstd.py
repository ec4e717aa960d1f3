"""zstd with a hard cap on the output, independent of the sizes that frames declare."""

from collections.abc import Callable

import zstandard

from knapper import limits
from knapper.errors import TooLarge, UserError

_STEP_BYTES = 256  # 64 blocks of at most 128 KiB: the most that one step can overshoot the cap is 8 MiB


def compress(data: bytes, level: int = 3) -> bytes:
    return zstandard.ZstdCompressor(level=level).compress(data)


def decompress(data: bytes, limit: int = limits.body_bytes_max) -> bytes:
    """The content of all frames. Raises TooLarge past `limit` bytes, UserError for broken or cut frames."""
    content, cut = decompress_prefix(data, limit)
    if cut:
        raise TooLarge(f"the zstd body holds more than {limit} bytes; allowed: {limit}; send less in one request")
    return content


def decompress_prefix(data: bytes, limit: int, take: Callable[[int], None] = lambda _: None) -> tuple[bytes, bool]:
    """(at most `limit` bytes of the content, whether there is more). `take` is called with the size of each part.

    Raises UserError for broken or cut frames, and the errors of `take`.
    """
    if (whole := _whole(data, limit, take)) is not None:
        return whole, False
    parts: list[bytes] = []
    size, rest = 0, memoryview(data)
    frame = _frame()
    while rest:
        step, rest = rest[:_STEP_BYTES], rest[_STEP_BYTES:]
        while step:
            try:
                part = frame.decompress(step)
            except zstandard.ZstdError as error:
                raise UserError(f"the body ({len(data)} bytes) is not zstd: {error}") from error
            take(len(part))
            parts.append(part)
            size += len(part)
            if size > limit:
                return b"".join(parts)[:limit], True
            if not frame.eof:
                break
            step = memoryview(frame.unused_data)
            if step or rest:
                frame = _frame()
    if not frame.eof:
        raise UserError(f"the zstd body ({len(data)} bytes) ends in the middle of a frame; send it whole")
    return b"".join(parts), False


def _whole(data: bytes, limit: int, take: Callable[[int], None]) -> bytes | None:
    """The content of a single frame with a declared size, without a copy; None for other frames."""
    try:
        size = zstandard.frame_content_size(data)
        if not 0 < size <= limit:
            return None
        take(size)
        frame = zstandard.ZstdDecompressor(max_window_size=limits.zstd_window_bytes_max)
        return frame.decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError:
        return None  # the decoder of parts reports the error


def _frame() -> "zstandard.ZstdDecompressionObj":  # a name that only the type stubs have
    return zstandard.ZstdDecompressor(max_window_size=limits.zstd_window_bytes_max).decompressobj()
