"""The gateway counts an image's tokens as the engine does, which reads it by transformers."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from knapper import limits
from knapper.catalogue import image_tokens
from knapper.engine.images.reader import ImageReader
from knapper.engine.models.composite import PREPROCESSOR
from knapper.errors import InvalidField, UserError
from knapper.wire.image_files import ImageFile
from knapper.wire.image_tokens import ImageTokens
from knapper.wire.types import Image
from tests.engine.pictures import IMAGE_TOKEN, PROCESSOR, picture, picture_model
from tests.gateway.openai.chatting import chat_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_model(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"size": None}, {"size": None, "min_pixels": 4096, "max_pixels": 65536}, {"patch_size": 14}],
    ids=["size", "none", "older names", "other patches"],
)
def test_a_count_is_the_engines(directory: Path, changes: dict[str, Any]) -> None:
    cuts = {name: value for name, value in {**PROCESSOR, **changes}.items() if value is not None}
    (directory / PREPROCESSOR).write_text(json.dumps(cuts))
    counted, reader, draw = image_tokens.read(directory), ImageReader(directory), random.Random(5)
    assert counted is not None
    for width, height in [
        (1, 1),
        (48, 16),
        (16, 3000),
        *((draw.randrange(2, 300), draw.randrange(2, 300)) for _ in "x" * 20),
    ]:
        tokens = counted.count(width, height)
        if tokens <= limits.image_tokens_max:
            placed = reader.placed(Image(0, tokens, 0, "png", picture(width, height)), "prompt")  # raises for another
            assert placed.tokens == tokens


def image(number: int, width: int = 32, height: int = 64) -> ImageFile:
    return ImageFile(f"messages[{number}]", "png", bytes([number]), width, height)


def test_images_stand_where_the_template_wrote_their_token() -> None:
    counted = ImageTokens(token=7, side=32, least=32 * 32, most=10**9)
    prompt, images = counted.placed([1, 7, 2, 7, 7, 3], [image(0), image(1, 32, 32), image(2)])
    assert prompt == [1, 0, 0, 2, 0, 0, 0, 3]
    assert [(each.at, each.tokens, each.data, each.name) for each in images] == [
        (1, 2, b"\0", "messages[0]"), (4, 1, b"\1", "messages[1]"), (5, 2, b"\2", "messages[2]"),
    ]  # fmt: skip
    for tokens, files in (([7, 7], [image(0)]), ([1], [image(0)])):
        with pytest.raises(
            InvalidField, match="image tokens of 1 images'; allowed: texts without the model's own token"
        ):
            counted.placed(tokens, files)
    assert counted.placed([7], [image(0, 32, 32 * limits.image_tokens_max)])[1][0].tokens == limits.image_tokens_max
    with pytest.raises(InvalidField, match=r"messages\[0\]: tokens is 16385; allowed: up to 16384"):
        counted.placed([7], [image(0, 32, 32 * (limits.image_tokens_max + 1))])


def test_a_model_of_texts_has_none_and_a_broken_one_is_named(directory: Path, tmp_path: Path) -> None:
    assert image_tokens.read(chat_model(tmp_path / "text")) is None
    (directory / PREPROCESSOR).write_text(json.dumps(PROCESSOR))
    found = image_tokens.read(directory)
    assert found is not None
    assert (found.token, found.side) == (IMAGE_TOKEN, 32)
    (directory / PREPROCESSOR).write_text(json.dumps({**PROCESSOR, "patch_size": "x"}))
    with pytest.raises(UserError, match="expected whole numbers"):
        image_tokens.read(directory)
