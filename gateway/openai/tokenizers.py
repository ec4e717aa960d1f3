"""Which languages the gateway has read: each model's own."""

import asyncio
from collections import OrderedDict
from pathlib import Path

from knapper.catalogue.served_models import ModelRecord
from knapper.catalogue.tokenizer import Language
from knapper.errors import InvalidField

_KEPT_MAX = 8  # tokenizers of large vocabularies take tens of megabytes


class Languages:
    """The most recently used ones, each read once."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, asyncio.Future[Language]] = OrderedDict()

    async def of(self, model: ModelRecord) -> Language:
        """Raises InvalidField if the model's files are not on this machine, or not whole."""
        if not model.directory:
            raise InvalidField(
                "model", model.name, "one whose files the gateway can read, since it needs the tokenizer",
                "Use the Tinker protocol, which takes and gives tokens",
            )  # fmt: skip
        found = self._kept.get(model.directory)
        if found is None or (found.done() and (found.cancelled() or found.exception() is not None)):
            reading = asyncio.to_thread(Language.read, Path(model.directory))
            found = self._kept[model.directory] = asyncio.ensure_future(reading)
        self._kept.move_to_end(model.directory)
        if len(self._kept) > _KEPT_MAX:
            self._kept.popitem(last=False)
        return await asyncio.shield(found)  # one caller's end must not take it from another
