"""Adapters as files that the core reads: fetched once, verified, kept in memory, least recently used evicted first.

    adapters/<run>/<seq>/  --bundles.read, verified-->  <memory>/knapper-adapters-.../<number>/adapter_model.safetensors
    a save of this process ----------- offer --------^

Their content identifies them: checkpoints with the same bytes are one adapter, all others are different adapters. They
lie there in the base's dtype, in which the core computes them.
"""

import asyncio
import hashlib
import itertools
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import structlog
import torch

from knapper import limits
from knapper.engine import checkpoint_format
from knapper.engine.layers.lora import layout
from knapper.engine.models.config import Facts
from knapper.errors import KnapperError, NotFound, UserError
from knapper.state.journal import bundles
from knapper.state.journal.machine import Files
from knapper.state.journal.records import Spec
from knapper.store import Store
from knapper.store.files import is_torn, lock
from knapper.vllm.core import Adapter

_FILES = frozenset({checkpoint_format.CONFIG, checkpoint_format.ADAPTER})
_OURS = "knapper-adapters-"

log = structlog.get_logger()


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter whose files are here."""

    adapter: Adapter
    spec: Spec
    size: int


@dataclass(eq=False)
class _Entry:
    """`users`: samples that use the adapter or wait for it; it stays meanwhile."""

    fetched: asyncio.Future[FetchedAdapter]
    users: int = 0

    @property
    def failed(self) -> bool:
        return self.fetched.cancelled() or (self.fetched.done() and self.fetched.exception() is not None)


class AdapterFiles:
    """The local adapter files. `forget` is called for an evicted adapter. `refuse(spec)`: why the core cannot have one;
    empty if it can.
    """

    def __init__(
        self,
        store: Store,
        facts: Facts,
        memory: Path,
        forget: Callable[[Adapter], Awaitable[None]],
        refuse: Callable[[Spec], str],
        dtype: torch.dtype,
    ) -> None:
        self._store, self._facts, self._forget, self._refuse, self._dtype = store, facts, forget, refuse, dtype
        self._offers: set[asyncio.Task[None]] = set()
        _sweep(memory)
        self._memory = memory
        self._directory: Path | None = None  # made for the first adapter: without any, a process leaves nothing
        self._descriptor = -1  # the open directory, for as long as this process lives
        self._numbers = itertools.count(1)
        self._contents: dict[str, str] = {}  # by bundle, whose content never changes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # by content, least recently used first

    @asynccontextmanager
    async def take(self, bundle: str) -> AsyncIterator[FetchedAdapter]:
        """The adapter of a bundle, which stays until the context exits.

        Raises NotFound if it was deleted, Corrupt if it differs from its index, UserError if the core cannot have it.
        """
        entry = await self._entry(bundle)
        entry.users += 1
        try:
            fetched = await asyncio.shield(entry.fetched)  # shielded: other callers may wait for the same fetch
            await self._trim()
            yield fetched
        finally:
            entry.users -= 1

    def offer(self, spec: Spec, files: Files) -> None:
        """Take an adapter of this process whose bundle is still to be stored: who asks for the bundle later finds its
        content here. Called on the event loop. One that the core cannot have is left to the refusal of its samples.
        """
        if not self._refuse(spec):
            task = asyncio.ensure_future(self._take_offered(spec, files))
            self._offers.add(task)
            task.add_done_callback(self._offers.discard)

    @property
    def offered(self) -> int:
        """Offers under way."""
        return len(self._offers)

    def close(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._descriptor)

    async def _entry(self, bundle: str) -> _Entry:
        content = self._contents.get(bundle)
        if content is None or content not in self._entries:
            index = await bundles.read_index(self._store, bundle)
            if index is None:
                raise NotFound(
                    "the weights of this sampler are gone: its checkpoint was deleted or expired, and its session has "
                    "ended; create another sampling client"
                )
            if reason := self._refuse(index.spec):
                raise UserError(reason)
            content = self._contents[bundle] = _content({part.name: part.sha256 for part in index.parts})
        return self._laid(content, lambda: self._fetch(bundle, content))

    def _laid(self, content: str, lay: Callable[[], Coroutine[Any, Any, FetchedAdapter]]) -> _Entry:
        """The entry of a content, as the most recent one; `lay` makes its files if there are none."""
        entry = self._entries.get(content)
        if entry is None or entry.failed:
            entry = self._entries[content] = _Entry(asyncio.ensure_future(lay()))
        self._entries.move_to_end(content)
        return entry

    async def _fetch(self, bundle: str, content: str) -> FetchedAdapter:
        index, files = await bundles.read(self._store, bundle, _FILES)
        return await self._lay(index.spec, files, content, bundle)

    async def _take_offered(self, spec: Spec, files: Files) -> None:
        copies = await asyncio.to_thread(lambda: {name: bytes(files[name]) for name in _FILES})
        hashes = await asyncio.to_thread(lambda: {name: hashlib.sha256(data).digest() for name, data in copies.items()})
        content = _content(hashes)
        entry = self._laid(content, lambda: self._lay(spec, copies, content, "this process"))
        try:
            await asyncio.shield(entry.fetched)
        except (KnapperError, OSError) as error:
            log.info("adapter not taken from memory: its samples will say why", content=content[:12], reason=str(error))
            return
        await self._trim()

    async def _lay(self, spec: Spec, files: dict[str, bytes], content: str, source: str) -> FetchedAdapter:
        # Checked here: an adapter that the core fails to load may end the core, for all requests.
        adapter_layout = layout(self._facts, spec)
        await asyncio.to_thread(checkpoint_format.read, files, spec, adapter_layout, with_optimizer=False)
        number = next(self._numbers)
        if self._directory is None:
            self._directory, self._descriptor = _locked_directory(self._memory)
        directory = self._directory / str(number)
        size = await asyncio.to_thread(_write, directory, files, self._dtype)
        log.info("adapter in memory", source=source, content=content[:12], bytes=size)
        return FetchedAdapter(Adapter(number, content, directory), spec, size)

    async def _trim(self) -> None:
        """Evict the least recently used until the rest fits; adapters in use stay in any case."""
        present = {
            content: (entry, entry.fetched.result())
            for content, entry in self._entries.items()
            if entry.fetched.done() and not entry.failed
        }
        count, size = len(present), sum(fetched.size for _, fetched in present.values())
        for content, (entry, fetched) in present.items():
            if count <= limits.adapters_cached_max and size <= limits.adapters_cached_bytes_max:
                return
            if entry.users == 0 and self._entries.get(content) is entry:
                del self._entries[content]
                count, size = count - 1, size - fetched.size
                await self._forget(fetched.adapter)
                await asyncio.to_thread(shutil.rmtree, fetched.adapter.directory, ignore_errors=True)


def refusal(spec: Spec, rank_max: int) -> str:
    """Why vLLM cannot have an adapter that the engine's sampler can; empty if it can."""
    if spec.rank > rank_max:
        return (
            f"the adapter has rank {spec.rank}; this vLLM sampler has room for ranks up to {rank_max}. Sample it with "
            "the torch sampler (KNAPPER_SAMPLER=torch), or raise KNAPPER_VLLM_RANK"
        )
    return ""


def _content(hashes: Mapping[str, bytes]) -> str:
    """The hash of the bundle's files that the core reads, by the SHA-256 of each file."""
    return hashlib.sha256(b"".join(hashes[name] for name in sorted(_FILES))).hexdigest()


def _write(directory: Path, files: dict[str, bytes], dtype: torch.dtype) -> int:
    """The bytes written."""
    directory.mkdir()
    size = 0
    for name in _FILES:
        content = _rounded(files[name], dtype) if name == checkpoint_format.ADAPTER else files[name]
        size += (directory / name).write_bytes(content)
    return size


def _rounded(adapter: bytes, dtype: torch.dtype) -> bytes:
    """A safetensors file with its numbers in `dtype`; float32 ones stay as they are."""
    if dtype == torch.float32:
        return adapter
    return safetensors.torch.save({name: tensor.to(dtype) for name, tensor in safetensors.torch.load(adapter).items()})


def _locked_directory(memory: Path) -> tuple[Path, int]:
    """A new directory for this account alone, and its descriptor, which locks it."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_OURS, dir=memory))
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process swept it before it was locked
            continue
        lock(descriptor)
        if os.fstat(descriptor).st_nlink:
            return directory, descriptor
        os.close(descriptor)


def _sweep(memory: Path) -> None:
    """Remove directories of killed processes, as they take memory. A living process locks its own."""
    for path in memory.glob(f"{_OURS}*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another account's, or gone
            continue
        try:
            if is_torn(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
