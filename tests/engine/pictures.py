"""A tiny model of images and text that knapper computes both of, and images for it."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from knapper.engine.models.composite import PREPROCESSOR
from knapper.wire.types import Image, Int32
from tests.engine.composites import composite_model

IMAGE_TOKEN = 250  # of the model's configuration
SIDE = 32  # pixels of a token
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2,
    "size": {"shortest_edge": SIDE * SIDE, "longest_edge": 16 * SIDE * SIDE},
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
}  # fmt: skip


def picture_model(directory: Path) -> Path:
    """`directory`, now holding a Qwen3-VL: two layers, both of which get features of images."""
    composite_model(directory, "qwen3_vl")
    (directory / PREPROCESSOR).write_text(json.dumps(PROCESSOR))
    return directory


def picture(width: int, height: int, seed: int = 0, kind: str = "png") -> bytes:
    """A file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Pillow.fromarray(pixels).save(out, kind)
    return out.getvalue()


def tokens_of(width: int, height: int) -> int:
    """Of an image that needs no scaling."""
    return round(width / SIDE) * round(height / SIDE)


def with_images(parts: Sequence[int | tuple[int, int] | bytes], rng: np.random.Generator) -> tuple[Int32, list[Image]]:
    """A sequence of so many random tokens, or an image of a width and height, or its file, and so on."""
    tokens: list[int] = []
    images = []
    for number, part in enumerate(parts):
        if isinstance(part, int):
            tokens += rng.integers(0, 200, part).tolist()
            continue
        data = part if isinstance(part, bytes) else picture(*part, seed=number)
        with Pillow.open(io.BytesIO(data)) as opened:
            count, kind = tokens_of(*opened.size), (opened.format or "").lower()
        images.append(Image(len(tokens), count, number, kind, data))
        tokens += [0] * count
    return np.array(tokens, dtype=np.int32), images
