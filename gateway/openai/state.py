"""State that requests of the OpenAI protocol share in one process."""

import asyncio
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from knapper.catalogue.tokenizer import Language
from knapper.errors import InvalidField
from knapper.state.audit import Audit
from knapper.state.checkpoints import Checkpoint
from knapper.state.model_record import ModelRecord
from knapper.store.cache import LruCache

_LANGUAGES_MAX = 8  # tokenizers of large vocabularies take tens of megabytes


class Languages:
    """The tokenizers and chat templates of the most recently used models, each read once."""

    def __init__(self) -> None:
        self._cached: LruCache[str, Language] = LruCache(_LANGUAGES_MAX)

    async def of(self, model: ModelRecord) -> Language:
        """Raises InvalidField if the model's files are missing on this machine, or incomplete."""
        if not model.directory:
            raise InvalidField(
                "model", model.name, "one whose files the gateway can read, since it needs the tokenizer",
                "Use the Tinker protocol, which takes and gives tokens",
            )  # fmt: skip
        path = Path(model.directory)
        return await self._cached.get_once(model.directory, lambda: asyncio.to_thread(Language.read, path))


@dataclass(frozen=True)
class OpenAIState:
    """`numbers`: a unique number for each sample request."""

    audit: Audit
    languages: Languages = field(default_factory=Languages)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    _noted: LruCache[tuple[str, str, str], None] = field(default_factory=LruCache)

    async def note_reading(self, tenant: str, checkpoint: Checkpoint) -> None:
        """Write to the audit log that a tenant samples from a checkpoint: once per process."""
        key = (tenant, checkpoint.path, checkpoint.bundle)
        await self._noted.get(key, lambda: self.audit.read(tenant, checkpoint.path, "sampling"))
