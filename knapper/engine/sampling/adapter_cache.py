"""LoRA adapters in memory: each loaded once, pinned while a sample uses it, evicted least recently used first."""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from knapper.engine import hardware
from knapper.engine.layers.lora import Lora
from knapper.engine.out_of_memory import MemoryShortage, as_shortage
from knapper.errors import Unavailable


class AdapterSource(Protocol):
    async def load(self, adapter: str) -> Lora:
        """The adapter of `SampleRequest.adapter`, on the decoder's device. Its content never changes."""
        ...


@dataclass(eq=False)
class _Entry:
    """`users`: samples that use the adapter or wait for it."""

    loaded: asyncio.Future[Lora]
    users: int = 0

    @property
    def bytes(self) -> int:
        """0 until it is loaded."""
        present = self.loaded.done() and not self.failed
        return self.loaded.result().nbytes if present else 0

    @property
    def failed(self) -> bool:
        return self.loaded.cancelled() or (self.loaded.done() and self.loaded.exception() is not None)


class AdapterCache:
    """At most `bytes_max` of adapters, least recently used evicted first; adapters in use stay in any case."""

    def __init__(self, source: AdapterSource, device: torch.device, bytes_max: int) -> None:
        self._source, self._device, self._bytes_max = source, device, bytes_max
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self._entries.values())

    @asynccontextmanager
    async def use(self, adapter: str) -> AsyncIterator[Lora]:
        """The adapter, pinned until the context exits.

        Raises what its source raises, OutOfMemory if it does not fit, Unavailable if it does not fit beside those in
        use.
        """
        entry = self._entries.get(adapter)
        if entry is None or entry.failed:
            entry = self._entries[adapter] = _Entry(asyncio.ensure_future(self._load(adapter)))
        entry.users += 1
        try:
            lora = await asyncio.shield(entry.loaded)  # shielded: other callers may wait for the same load
            self._trim(self._bytes_max)
            yield lora
        finally:
            entry.users -= 1
            if self._entries.get(adapter) is entry:
                self._entries.move_to_end(adapter)
            self._trim(self._bytes_max)

    def release(self) -> None:
        """Drop every adapter that no request uses."""
        self._trim(0)

    async def _load(self, adapter: str) -> Lora:
        try:
            return await self._source.load(adapter)
        except Exception as error:
            failure = as_shortage(error)
            if not isinstance(failure, MemoryShortage):
                raise
        self._trim(0)
        hardware.release(self._device)
        try:
            return await self._source.load(adapter)
        except Exception as error:
            failure = as_shortage(error)
            if not isinstance(failure, MemoryShortage):
                raise
        if self.bytes:
            raise Unavailable(f"adapter {adapter} does not fit beside those that other samples use now", 5.0)
        raise failure.error(f"adapter {adapter}", self._device, "Use one of a lower rank")

    def _trim(self, bytes_max: int) -> None:
        excess = self.bytes - bytes_max
        for adapter, entry in list(self._entries.items()):
            if entry.users == 0 and (entry.failed or (excess > 0 and entry.loaded.done())):
                excess -= entry.bytes
                del self._entries[adapter]
