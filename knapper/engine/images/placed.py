"""Where images stand in a sequence, and the positions that its rows then have.

T rows of a sequence. An image stands for a grid of rows, which lie line by line.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from knapper.errors import InvalidField
from knapper.wire.types import Image, Int64

_AXES: Final = 3  # time, height and width


@dataclass(frozen=True, eq=False)
class PlacedImage:
    """An image that was read and found right. `at`: its first row. `grid`: its rows down and across."""

    at: int
    grid: tuple[int, int]
    data: bytes

    @cached_property
    def digest(self) -> bytes:
        """Of its content: images of one digest have the same rows."""
        return hashlib.sha256(self.data).digest()

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def turns(self) -> int:
        """By how much it moves the positions of what follows."""
        return max(self.grid)


def expect_none(images: Sequence[Image], where: str) -> None:
    """Raises InvalidField for the first image, for a model that reads texts alone."""
    for image in images:
        field, todo = image.field(where), "This model is text only: send token ids"
        raise InvalidField(field, "image", "encoded_text with tokens", todo)


def positions(rows: int, images: Sequence[PlacedImage]) -> Int64:
    """(T), or with images (T, 3): by time, height and width.

    A row of text has one position on all axes, and an image's rows their place in its grid, counted from the position
    at which it begins. What follows goes on behind the longer side. Source: Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    if not images:
        return np.arange(rows, dtype=np.int64)
    positions_TA = np.empty((rows, _AXES), dtype=np.int64)
    row = position = 0
    for image in images:
        positions_TA[row : image.at] = _line(position, image.at - row)
        position += image.at - row
        row = image.at + image.tokens
        down, across = np.divmod(np.arange(image.tokens), image.grid[1])
        positions_TA[image.at : row] = position + np.stack([np.zeros_like(down), down, across], axis=1)
        position += image.turns
    positions_TA[row:] = _line(position, rows - row)
    return positions_TA


def shift(images: Iterable[PlacedImage]) -> int:
    """What the position of a row behind these images is beyond its number."""
    return sum(image.turns - image.tokens for image in images)


def joined(parts: Sequence[Int64]) -> Int64:
    """The positions of several sequences, one after another: (N), or (N, 3) if one of them has images."""
    if all(part.ndim == 1 for part in parts):
        return np.concatenate(parts)
    return np.concatenate([part if part.ndim == 2 else part[:, None].repeat(_AXES, axis=1) for part in parts])


def content_keys(tokens: list[int], images: Sequence[PlacedImage]) -> list[int]:
    """What tells each row's content: its token id, or for an image a number that only its own rows have."""
    keys = list(tokens)
    for image in images:
        base = int.from_bytes(image.digest) << 32
        keys[image.at : image.at + image.tokens] = range(base, base + image.tokens)
    return keys


def digest(images: Iterable[PlacedImage]) -> bytes:
    """Of all images of a sequence, with their places; empty without any."""
    return b"".join(image.at.to_bytes(8) + image.digest for image in images)


def common(first: Sequence[PlacedImage], second: Sequence[PlacedImage], tokens: int) -> int:
    """How many of `tokens` rows, whose ids are those of both sequences, are the same rows in both."""
    for one, other in zip(first, second, strict=False):
        if (one.at, one.digest) != (other.at, other.digest):
            return min(tokens, one.at, other.at)
    more = [*first[len(second) :], *second[len(first) :]]
    return min(tokens, more[0].at) if more else tokens


def begun(images: Sequence[PlacedImage], tokens: int) -> int:
    """`tokens`, or fewer: an image is not divided."""
    return min((image.at for image in images if image.at < tokens < image.at + image.tokens), default=tokens)


def _line(start: int, rows: int) -> Int64:
    return (start + np.arange(rows, dtype=np.int64))[:, None]
