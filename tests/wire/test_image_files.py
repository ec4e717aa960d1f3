"""Sizes of images are read off their headers as Pillow reads them, and limits hold before anything is decoded."""

import base64
import contextlib
import io
import random
import struct
from typing import Any

import pytest
from PIL import Image as Pillow

from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.wire import image_files

FIELD = "messages[0].content[0].image_url.url"


def file(width: int, height: int, kind: str = "png", **options: Any) -> bytes:
    out = io.BytesIO()
    Pillow.new("RGB", (width, height), "red").save(out, kind, **options)
    return out.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read(text: str) -> image_files.ImageFile:
    return image_files.of_url(text, "messages[0].content[0]", FIELD)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("png", {}), ("png", {"interlace": 1}), ("jpeg", {}), ("jpeg", {"progressive": True}),
        ("jpeg", {"exif": b"Exif\0\0" + b"\xff\xd8\xff\xc0" * 99, "icc_profile": bytes(70_000)}),
    ],
    ids=str,
)  # fmt: skip
def test_a_size_is_what_pillow_says(kind: str, options: dict[str, Any]) -> None:
    for width, height in ((1, 1), (31, 200), (1000, 7)):
        data = file(width, height, kind, **options)
        found = read(url(data, kind))
        with Pillow.open(io.BytesIO(data)) as opened:
            assert (found.width, found.height) == opened.size == (width, height)
        assert (found.data, found.format, found.name) == (data, kind, "messages[0].content[0]")


def test_markers_may_be_filled_up_with_any_number_of_bytes() -> None:
    """Seven million of them, which are passed over at once: one by one they would take a worker's second."""
    for fill in (1, 2, 7_000_000):
        data = jpeg(4).replace(b"\xff\xfe", b"\xff" * fill + b"\xff\xfe", 1)
        assert (read(url(data, "jpeg")).width, read(url(data, "jpeg")).height) == (5, 3)


def png(width: int, height: int, more: int = 0) -> bytes:
    """A header without pixels."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", width, height, 8, 2, 0, 0, 0) + bytes(more)


def jpeg(segments: int) -> bytes:
    frame = b"\xff\xc0" + struct.pack(">HBHHB", 8, 8, 3, 5, 0)
    return b"\xff\xd8" + b"\xff\xfe\x00\x02" * (segments - 2) + frame + b"\xff\xda\x00\x02"


def test_limits_hold_and_one_more_is_refused() -> None:
    side = 4096
    assert side * side == limits.image_pixels_max
    assert read(url(png(side, side))).width == side
    with pytest.raises(TooLarge, match=rf"4097 x 4096 pixels; allowed: {limits.image_pixels_max}"):
        read(url(png(side + 1, side)))
    assert read(url(png(limits.image_sides_ratio_max, 1))).height == 1
    with pytest.raises(InvalidField, match=r"width and height is \(201, 1\)"):
        read(url(png(limits.image_sides_ratio_max + 1, 1)))
    header = len(png(1, 1))
    assert len(read(url(png(1, 1, limits.image_bytes_max - header))).data) == limits.image_bytes_max
    for more in (1, 3, 300):
        with pytest.raises(TooLarge, match=f"bytes; allowed: {limits.image_bytes_max}"):
            read(url(png(1, 1, limits.image_bytes_max - header + more)))
    assert read(url(jpeg(limits.image_segments_max), "jpeg")).width == 5
    with pytest.raises(InvalidField, match="its header is not one"):
        read(url(jpeg(limits.image_segments_max + 1), "jpeg"))


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        ("http://127.0.0.1:1/x.png", "allowed: a data: URL of a PNG or JPEG.* fetches nothing that a request names"),
        ("https://example.com/x.png", "fetches nothing"), ("file:///etc/passwd", "fetches nothing"),
        ("data:image/png,abc", "fetches nothing"), ("data:" + "x" * 100 + ";base64,", "fetches nothing"),
        ("", "fetches nothing"),
        ("data:image/webp;base64,AAAA", "is 'image/webp'; allowed: image/png, image/jpeg, image/jpg"),
        ("data:image/png;base64,A*AA", "allowed: base64"), ("data:image/png;base64,AAA", "allowed: base64"),
        ("data:image/png;base64,", "the file of a PNG, as its type says"),
        (url(file(3, 3), "jpeg"), "the file of a JPEG, as its type says"),
        (url(file(3, 3, "jpeg")), "the file of a PNG, as its type says"),
        (url(png(0, 3)), "its header is not one"), (url(file(3, 3, "gif")), "its header is not one"),
    ],
)  # fmt: skip
def test_all_else_is_refused_by_its_field(sent: str, said: str) -> None:
    with pytest.raises(InvalidField, match=said) as refused:
        read(sent)
    assert refused.value.field == FIELD


def test_a_damaged_header_is_refused_or_read_and_nothing_else() -> None:
    draw = random.Random(3)
    for _ in range(600):
        kind = draw.choice(("png", "jpeg"))
        data = bytearray(file(20, 30, kind))
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(min(400, len(data)))] = draw.randrange(256)
        with contextlib.suppress(UserError):
            read(url(bytes(data[: draw.randrange(len(data))]), kind))
