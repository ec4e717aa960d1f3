"""Chunks of a prompt, in JSON or protobuf, as one sequence: token ids, and places for images. Decodes no image."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from knapper import limits
from knapper.errors import InvalidField, TooLarge
from knapper.wire.types import Image, Int32

ALLOWED = "encoded_text with tokens, or for models of images an image with its data"
_TODO = {
    "image_asset_pointer": "Send the image's bytes: this server fetches nothing that a request names",
    "dmel": "No model of audio is served",
}


@dataclass
class Prompt:
    """A prompt in the making; `name` for error messages."""

    name: str
    images: list[Image] = field(default_factory=list)
    _parts: list[Int32] = field(default_factory=list)
    _length: int = 0

    def add_text(self, tokens: Int32) -> None:
        self._parts.append(tokens)
        self._length += len(tokens)

    def add_image(self, chunk: int, data: bytes, kind: str, expected_tokens: int | None) -> None:
        """Raises InvalidField without `expected_tokens`: they are counted before the image is decoded."""
        if expected_tokens is None or not 1 <= expected_tokens <= limits.image_tokens_max:
            where = f"{self.name}.chunks[{chunk}].expected_tokens"
            todo = "Renderers of tinker-cookbook compute it with the model's image processor"
            raise InvalidField(where, expected_tokens, f"1 to {limits.image_tokens_max}, the image's tokens", todo)
        self.images.append(Image(self._length, expected_tokens, chunk, kind, data))
        self.add_text(np.zeros(expected_tokens, np.int32))

    @property
    def tokens(self) -> Int32:
        """int32 (P); 0 for each token of an image."""
        return np.concatenate(self._parts) if self._parts else np.zeros(0, np.int32)


def refused(name: str, chunk: int, kind: str | None) -> InvalidField:
    """Of a chunk that no model takes."""
    return InvalidField(f"{name}.chunks[{chunk}]", kind, ALLOWED, _TODO.get(kind or "", ""))


def expect_few(images: int) -> None:
    """Raises TooLarge for more images than a request may have: each takes its tokens' memory at once."""
    if images > limits.images_max:
        raise TooLarge(f"the request has {images} images; allowed: {limits.images_max}; send fewer a call")


def cut(tokens_T: Int32, images: Sequence[Image]) -> list[Int32 | Image]:
    """The chunks of a sequence, texts and images in order."""
    parts: list[Int32 | Image] = []
    start = 0
    for image in images:
        parts += [tokens_T[start : image.at], image] if image.at > start else [image]
        start = image.at + image.tokens
    return [*parts, tokens_T[start:]] if start < len(tokens_T) or not parts else parts
