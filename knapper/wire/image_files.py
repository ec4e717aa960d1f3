"""Images as OpenAI's and Anthropic's clients send them: base64 in the request, their sizes read off the files' headers.

Nothing of an image is decoded or expanded here, and no address is fetched.
"""

import base64
import binascii
import re
import struct
from dataclasses import dataclass
from typing import Final

from knapper import limits
from knapper.errors import InvalidField, TooLarge

FORMATS: Final = {"image/png": "png", "image/jpeg": "jpeg", "image/jpg": "jpeg"}
DATA_URL: Final = "a data: URL of a PNG or JPEG, data:image/png;base64,..."
NOT_FETCHED: Final = "Send the image's bytes: this server fetches nothing that a request names"
_SHOWN: Final = 64  # of a URL, in which the type of its data has to be
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers of JPEG: ITU T.81, table B.1
_FILL: Final = re.compile(rb"(?:\xff+(?=\xff))?")  # before a marker; megabytes of it, if somebody likes
_ALONE: Final = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length
_SCAN: Final = frozenset({0xD9, 0xDA})  # behind which is no header


@dataclass(frozen=True)
class ImageFile:
    """A file of `format`. `name`: its place in the request. `width`, `height`: in pixels, as its header says."""

    name: str
    format: str
    data: bytes
    width: int
    height: int


def of_url(url: str, name: str, field: str) -> ImageFile:
    """Raises InvalidField for anything but a data: URL of an image that is taken, TooLarge. `field`: the URL's."""
    head, comma, _ = url[:_SHOWN].partition(",")
    match = re.fullmatch(r"data:([\w/+.-]+);base64", head, re.ASCII) if comma else None
    if match is None:
        raise InvalidField(field, url[:_SHOWN], DATA_URL, NOT_FETCHED)
    return of_base64(match[1].lower(), url[len(head) + 1 :], name, field)


def of_base64(media_type: str, text: str, name: str, field: str) -> ImageFile:
    """Raises InvalidField for what is no PNG or JPEG of that type, TooLarge by its length or its header."""
    if media_type not in FORMATS:
        raise InvalidField(field, media_type, ", ".join(FORMATS))
    if len(text) // 4 * 3 > limits.image_bytes_max + 2:
        raise _too_large(field, f"some {len(text) // 4 * 3} bytes", f"{limits.image_bytes_max} bytes")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidField(field, text[:_SHOWN], f"base64 ({error})") from error
    if len(data) > limits.image_bytes_max:
        raise _too_large(field, f"{len(data)} bytes", f"{limits.image_bytes_max} bytes")
    kind = FORMATS[media_type]
    found = _png(data) if kind == "png" else _jpeg(data)
    if found is None or not min(found):
        raise InvalidField(field, media_type, f"the file of a {kind.upper()}, as its type says; its header is not one")
    width, height = found
    if width * height > limits.image_pixels_max:
        raise _too_large(field, f"{width} x {height} pixels", str(limits.image_pixels_max))
    if max(width, height) > limits.image_sides_ratio_max * min(width, height):
        allowed = f"a longer side of at most {limits.image_sides_ratio_max} times the shorter one"
        raise InvalidField(f"{field}: width and height", (width, height), allowed)
    return ImageFile(name, kind, data, width, height)


def _png(data: bytes) -> tuple[int, int] | None:
    """Source: PNG, third edition, section 11.2.1."""
    if not data.startswith(_PNG) or data[12:16] != b"IHDR" or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def _jpeg(data: bytes) -> tuple[int, int] | None:
    """Of the last frame header before the pixels. Source: ITU T.81, annex B."""
    if not data.startswith(b"\xff\xd8"):
        return None
    at, found = 2, None
    for _ in range(limits.image_segments_max):
        at = _FILL.match(data, at).end()  # type: ignore[union-attr]  # it matches nothing, too
        if len(data) < at + 4 or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _SCAN:
            return found
        if marker in _ALONE:
            at += 2
            continue
        if marker in _FRAMES and len(data) >= at + 9:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            found = width, height
        at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
    return None


def _too_large(field: str, size: str, allowed: str) -> TooLarge:
    error = TooLarge(f"{field} has {size}; allowed: {allowed}; send a smaller image")
    error.field = field
    return error
