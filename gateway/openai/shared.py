"""What requests of the OpenAI protocol share in one process."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from gateway.openai.tokenizers import Languages
from knapper.state.audit import Audit
from knapper.state.checkpoints import Checkpoint
from knapper.store.cache import LruCache


@dataclass(frozen=True)
class OpenAIState:
    """`numbers`: of requests to samplers, so that no two are taken for one."""

    audit: Audit
    languages: Languages = field(default_factory=Languages)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    _noted: LruCache[tuple[str, str, str], None] = field(default_factory=LruCache)

    async def note_reading(self, tenant: str, checkpoint: Checkpoint) -> None:
        """Write into the audit log that a tenant samples from a checkpoint: once, in the life of a process."""
        key = (tenant, checkpoint.path, checkpoint.bundle)
        await self._noted.get(key, lambda: self.audit.read(tenant, checkpoint.path, "sampling"))
