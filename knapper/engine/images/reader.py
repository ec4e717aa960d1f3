"""Reads images that clients send: checks them by their headers first, decodes them, and cuts them into patches.

Nothing of an image is expanded before its header was found within the limits. P patches of an image, D numbers of one.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from cachetools import LRUCache
from PIL import Image as Pillow
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from knapper import limits
from knapper.engine.images.placed import PlacedImage
from knapper.engine.models.tensor_header import BrokenModel
from knapper.errors import InvalidField, TooLarge
from knapper.wire.types import Image
from knapper.wire.untrusted import parsing

_FORMATS: Final = {"png": "PNG", "jpeg": "JPEG"}  # as the SDK names them, and as Pillow does
_READ_MAX: Final = 4096  # images that are known to be whole

Grid = tuple[int, int]


class ImageReader:
    """For one model, by its preprocessor_config.json. May be called on any thread."""

    def __init__(self, directory: Path) -> None:
        """Raises BrokenModel for a configuration of another processor."""
        try:
            self._processor: Any = Qwen2VLImageProcessorPil.from_pretrained(directory, local_files_only=True)
            self._side = self._processor.patch_size * self._processor.merge_size
            self._least, self._most = (self._processor.size[edge] for edge in ("shortest_edge", "longest_edge"))
        except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BrokenModel(f"{directory}: its preprocessor_config.json is not that of Qwen3-VL: {error}") from error
        self._lock = threading.Lock()
        self._grids: LRUCache[bytes, Grid] = LRUCache(_READ_MAX)  # by digest, of images that were decoded once

    def placed(self, image: Image, where: str) -> PlacedImage:
        """The image, decoded once. Raises InvalidField or TooLarge, which name `where` and the chunk."""
        field = image.field(where)
        if image.format not in _FORMATS:
            raise InvalidField(f"{field}.format", image.format, ", ".join(_FORMATS))
        if len(image.data) > limits.image_bytes_max:
            raise TooLarge(
                f"{field}.data has {len(image.data)} bytes; allowed: {limits.image_bytes_max}; send a smaller image"
            )
        found = PlacedImage(image.at, (0, 0), image.data)
        with self._lock:
            grid = self._grids.get(found.digest + image.format.encode())
        if grid is None:
            grid = self._read(image, field)
            with self._lock:
                self._grids[found.digest + image.format.encode()] = grid
        found = PlacedImage(image.at, grid, image.data)
        if found.tokens != image.tokens:
            allowed = f"{found.tokens}, which is what this model makes of it ({grid[0]} x {grid[1]})"
            todo = f"Compute it with the image processor of the model, or set it to {found.tokens}"
            raise InvalidField(f"{field}.expected_tokens", image.tokens, allowed, todo)
        return found

    def patches(self, image: PlacedImage) -> tuple[Tensor, Tensor]:
        """float32 (P, D), and int64 (1, 3): the patches in time, height and width."""
        with Pillow.open(io.BytesIO(image.data), formats=tuple(_FORMATS.values())) as opened:
            cut = self._processor(images=[opened], return_tensors="np")
        return torch.from_numpy(cut["pixel_values"]), torch.from_numpy(cut["image_grid_thw"])

    def _read(self, image: Image, field: str) -> Grid:
        with _decoding(field), Pillow.open(io.BytesIO(image.data), formats=[_FORMATS[image.format]]) as opened:
            width, height = opened.size
            if width * height > limits.image_pixels_max:
                raise _too_many_pixels(field, f"{width} x {height}")
            if max(width, height) > limits.image_sides_ratio_max * min(width, height):
                allowed = f"a longer side of at most {limits.image_sides_ratio_max} times the shorter one"
                raise InvalidField(f"{field}.data: width and height", (width, height), allowed)
            opened.load()
        height, width = smart_resize(height, width, self._side, self._least, self._most)
        return height // self._side, width // self._side


@contextmanager
def _decoding(field: str) -> Iterator[None]:
    """For Pillow, which raises whatever its parsers raise."""
    bombs = (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning)

    def wrong(error: Exception) -> InvalidField | TooLarge:
        if isinstance(error, bombs):
            return _too_many_pixels(field, "far more")
        allowed = "a whole PNG or JPEG file, as its format says"
        return InvalidField(f"{field}.data", f"{type(error).__name__}: {error}", allowed)

    with parsing(wrong):
        yield


def _too_many_pixels(field: str, size: str) -> TooLarge:
    return TooLarge(f"{field}.data has {size} pixels; allowed: {limits.image_pixels_max}; send a smaller image")
