"""Which languages the gateway has read: each model's own."""

import asyncio
from pathlib import Path

from knapper.catalogue.tokenizer import Language
from knapper.errors import InvalidField
from knapper.state.model_record import ModelRecord
from knapper.store.cache import LruCache

_KEPT_MAX = 8  # tokenizers of large vocabularies take tens of megabytes


class Languages:
    """The most recently used ones, each read once."""

    def __init__(self) -> None:
        self._kept: LruCache[str, Language] = LruCache(_KEPT_MAX)

    async def of(self, model: ModelRecord) -> Language:
        """Raises InvalidField if the model's files are not on this machine, or not whole."""
        if not model.directory:
            raise InvalidField(
                "model", model.name, "one whose files the gateway can read, since it needs the tokenizer",
                "Use the Tinker protocol, which takes and gives tokens",
            )  # fmt: skip
        path = Path(model.directory)
        return await self._kept.get_once(model.directory, lambda: asyncio.to_thread(Language.read, path))
