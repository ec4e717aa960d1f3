"""What a model's files say of the tokens of images. Loads no torch."""

from pathlib import Path
from typing import Any, Final

from knapper.engine.models.composite import PREPROCESSOR
from knapper.engine.models.config import serves_images
from knapper.engine.models.fields import read_json
from knapper.errors import UserError
from knapper.wire.image_tokens import ImageTokens

_TOKEN: Final = 151655  # where config.json is silent
_PATCH, _MERGED = 14, 2
_LEAST, _MOST = 56 * 56, 28 * 28 * 1280


def read(directory: Path) -> ImageTokens | None:
    """None of a model that reads texts alone. Raises UserError for a configuration that is broken."""
    if not serves_images(directory):
        return None
    cuts: dict[str, Any] = read_json(directory / PREPROCESSOR) or {}
    edges = {"shortest_edge": _LEAST, "longest_edge": _MOST, **(cuts.get("size") or {})}
    least, most = cuts.get("min_pixels") or edges["shortest_edge"], cuts.get("max_pixels") or edges["longest_edge"]
    patch, merged = cuts.get("patch_size", _PATCH), cuts.get("merge_size", _MERGED)
    token = (read_json(directory / "config.json") or {}).get("image_token_id", _TOKEN)
    numbers = token, patch, merged, least, most
    if not all(isinstance(each, int) and each > 0 for each in numbers):
        raise UserError(f"{directory}: {PREPROCESSOR} and image_token_id have {numbers}; expected whole numbers")
    return ImageTokens(token=token, side=patch * merged, least=least, most=most)
