"""Images in the messages of chats: taken out of them, and put into the prompt's tokens."""

from collections.abc import Sequence
from typing import Any, Final

from knapper.catalogue.tools import AgentMessage
from knapper.errors import InvalidField
from knapper.state.model_record import ModelRecord
from knapper.wire import prompts
from knapper.wire.image_files import ImageFile
from knapper.wire.image_tokens import ImageTokens
from knapper.wire.types import Image

_IMAGE: Final = "image"

Part = str | ImageFile


def content(parts: Sequence[Part], between: str = "") -> str | list[dict[str, Any]]:
    """As chat templates take it: one text, or with images a list. `between`: what joins texts that are neighbours."""
    joined: list[Part] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] = f"{joined[-1]}{between}{part}"
        else:
            joined.append(part)
    if not joined or joined == [text for text in joined if isinstance(text, str)]:
        return str(joined[0]) if joined else ""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": _IMAGE, _IMAGE: part} for part in joined
    ]


def apart(messages: Sequence[AgentMessage]) -> tuple[list[AgentMessage], tuple[ImageFile, ...]]:
    """(the messages as templates take them, their images in order). Raises InvalidField for an image of no user, and
    TooLarge for too many.
    """
    images: list[ImageFile] = []
    plain: list[AgentMessage] = []
    for message in messages:
        if not isinstance(message["content"], list):
            plain.append(message)
            continue
        own = [part[_IMAGE] for part in message["content"] if part["type"] == _IMAGE]
        if message["role"] != "user":
            raise InvalidField(own[0].name, "an image", f"texts in messages of the role {message['role']}")
        images += own
        parts = [{"type": _IMAGE} if part["type"] == _IMAGE else part for part in message["content"]]
        plain.append({**message, "content": parts})
    prompts.expect_few(len(images))
    return plain, tuple(images)


def tokens_of(model: ModelRecord, images: Sequence[ImageFile]) -> ImageTokens | None:
    """None without images. Raises InvalidField for a model that reads texts alone."""
    if images and model.images is None:
        todo = "Models of images are dense Qwen3-VL with their preprocessor_config.json"
        raise InvalidField(images[0].name, "an image", f"texts: {model.name} reads nothing else", todo)
    return model.images if images else None


def placed(
    prompt: list[int], tokens: ImageTokens | None, files: Sequence[ImageFile]
) -> tuple[list[int], tuple[Image, ...]]:
    """The prompt that is sampled from. Raises InvalidField."""
    return (prompt, ()) if tokens is None else tokens.placed(prompt, files)
