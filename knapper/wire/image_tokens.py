"""How many tokens a model makes of an image, and where they stand in a prompt, without decoding any."""

import math
from collections.abc import Sequence

import msgspec

from knapper import limits
from knapper.errors import InvalidField
from knapper.wire.image_files import ImageFile
from knapper.wire.types import Image


class ImageTokens(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one model. `token`: the id that its chat template writes for an image. `side`: of a token, in pixels; `least`
    and `most`: pixels that an image is scaled to have.
    """

    token: int
    side: int
    least: int
    most: int

    def count(self, width: int, height: int) -> int:
        """Source: the scaling of Qwen2-VL, arXiv 2409.12191, section 2.1: whole tokens, within the pixels allowed."""
        side = self.side
        down, across = round(height / side), round(width / side)
        if down * across * side * side > self.most:
            by = math.sqrt(height * width / self.most)
            down, across = (max(1, math.floor(edge / by / side)) for edge in (height, width))
        elif down * across * side * side < self.least:
            by = math.sqrt(self.least / (height * width))
            down, across = (math.ceil(edge * by / side) for edge in (height, width))
        return down * across

    def placed(self, tokens: Sequence[int], files: Sequence[ImageFile]) -> tuple[list[int], tuple[Image, ...]]:
        """The prompt with each image's tokens (0) in place of the one that the template wrote, and the images.

        Raises InvalidField if there are not as many of these as images, or one has more tokens than an image may have.
        """
        found = [place for place, token in enumerate(tokens) if token == self.token]
        if len(found) != len(files):
            raise InvalidField(
                "messages", f"{len(found)} image tokens of {len(files)} images",
                "texts without the model's own token for an image, and a chat template that writes one for each",
            )  # fmt: skip
        whole: list[int] = []
        images: list[Image] = []
        start = 0
        for number, (place, file) in enumerate(zip(found, files, strict=True)):
            count = self.count(file.width, file.height)
            if count > limits.image_tokens_max:
                raise InvalidField(
                    f"{file.name}: tokens", count, f"up to {limits.image_tokens_max}; send a smaller one"
                )
            whole += tokens[start:place]
            images.append(Image(len(whole), count, number, file.format, file.data, file.name))
            whole += [0] * count
            start = place + 1
        return [*whole, *tokens[start:]], tuple(images)
