"""Adapters as files that the core reads: fetched once, verified, in memory, the least used gone first.

    adapters/<run>/<seq>/  --bundles.read, verified-->  <memory>/knapper-adapters-.../<number>/adapter_model.safetensors

What they hold is what they are: two checkpoints with the same bytes are one adapter, and no two others ever are.
"""

import asyncio
import hashlib
import itertools
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from knapper import limits
from knapper.engine import checkpoint_format
from knapper.engine.layers.lora import layout
from knapper.engine.models.config import Facts
from knapper.errors import NotFound, UserError
from knapper.state.journal import bundles
from knapper.state.journal.records import Index, Spec
from knapper.store import Store
from knapper.store.files import hold, torn
from knapper.vllm.core import Adapter

_FILES = frozenset({checkpoint_format.CONFIG, checkpoint_format.ADAPTER})
_OURS = "knapper-adapters-"

log = structlog.get_logger()


@dataclass(frozen=True)
class Shelved:
    """An adapter that is here."""

    adapter: Adapter
    spec: Spec
    size: int


@dataclass(eq=False)
class _Place:
    """`users`: samples that need the adapter now, or wait for it: it stays."""

    fetched: asyncio.Future[Shelved]
    users: int = 0

    @property
    def failed(self) -> bool:
        return self.fetched.cancelled() or (self.fetched.done() and self.fetched.exception() is not None)


class AdapterFiles:
    """`forget` hears of an adapter that goes. `refuse(spec)` says why the core cannot have one, or nothing."""

    def __init__(
        self,
        store: Store,
        facts: Facts,
        memory: Path,
        forget: Callable[[Adapter], Awaitable[None]],
        refuse: Callable[[Spec], str],
    ) -> None:
        self._store, self._facts, self._forget, self._refuse = store, facts, forget, refuse
        _sweep(memory)
        self._memory = memory
        self._directory: Path | None = None  # made for the first adapter: a process without any leaves nothing
        self._held = -1  # a descriptor of it, as long as this process lives
        self._numbers = itertools.count(1)
        self._contents: dict[str, str] = {}  # of bundles: what a name holds never changes
        self._here: OrderedDict[str, _Place] = OrderedDict()  # by content, the longest unused first

    @asynccontextmanager
    async def take(self, bundle: str) -> AsyncIterator[Shelved]:
        """The adapter of a bundle, which stays until this is left.

        Raises NotFound once it was deleted, Corrupt if it is not what its index says, UserError for one that the core
        cannot have.
        """
        place = await self._place(bundle)
        place.users += 1
        try:
            shelved = await asyncio.shield(place.fetched)  # one caller's end must not take it from another
            await self._make_room()
            yield shelved
        finally:
            place.users -= 1

    def close(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            os.close(self._held)

    async def _place(self, bundle: str) -> _Place:
        content = self._contents.get(bundle)
        if content is None or content not in self._here:
            index = await bundles.read_index(self._store, bundle)
            if index is None:
                raise NotFound(
                    "the weights of this sampler are gone: its checkpoint was deleted or expired, and its session has "
                    "ended; create another sampling client"
                )
            if why := self._refuse(index.spec):
                raise UserError(why)
            content = self._contents[bundle] = _content(index)
        place = self._here.get(content)
        if place is None or place.failed:
            place = self._here[content] = _Place(asyncio.ensure_future(self._fetch(bundle, content)))
        self._here.move_to_end(content)
        return place

    async def _fetch(self, bundle: str, content: str) -> Shelved:
        index, files = await bundles.read(self._store, bundle, _FILES)
        # Whatever is wrong with it is found here: what the core fails to load may end it, for all.
        where = layout(self._facts, index.spec)
        await asyncio.to_thread(checkpoint_format.read, files, index.spec, where, with_optimizer=False)
        number = next(self._numbers)
        if self._directory is None:
            self._directory, self._held = _own(self._memory)
        directory = self._directory / str(number)
        await asyncio.to_thread(_write, directory, files)
        size = sum(map(len, files.values()))
        log.info("adapter fetched", adapter=bundle, content=content[:12], bytes=size)
        return Shelved(Adapter(number, content, directory), index.spec, size)

    async def _make_room(self) -> None:
        """The longest unused go, until the rest fits; those that are needed now stay in any case."""
        here = {
            content: (place, place.fetched.result())
            for content, place in self._here.items()
            if place.fetched.done() and not place.failed
        }
        count, size = len(here), sum(shelved.size for _, shelved in here.values())
        for content, (place, shelved) in here.items():
            if count <= limits.adapters_cached_max and size <= limits.adapters_cached_bytes_max:
                return
            if place.users == 0 and self._here.get(content) is place:
                del self._here[content]
                count, size = count - 1, size - shelved.size
                await self._forget(shelved.adapter)
                await asyncio.to_thread(shutil.rmtree, shelved.adapter.directory, ignore_errors=True)


def _content(index: Index) -> str:
    """The hash of what the core reads of the bundle."""
    parts = sorted((part.name, part.sha256) for part in index.parts if part.name in _FILES)
    return hashlib.sha256(b"".join(sha256 for _, sha256 in parts)).hexdigest()


def _write(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir()
    for name in _FILES:
        (directory / name).write_bytes(files[name])


def _own(memory: Path) -> tuple[Path, int]:
    """A new directory for this account alone, and a descriptor that holds it."""
    while True:
        directory = Path(tempfile.mkdtemp(prefix=_OURS, dir=memory))
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another process swept it before it was held
            continue
        hold(descriptor)
        if os.fstat(descriptor).st_nlink:
            return directory, descriptor
        os.close(descriptor)


def _sweep(memory: Path) -> None:
    """What processes left that were killed: it is memory. Those that live hold their directory."""
    for path in memory.glob(f"{_OURS}*"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another account's, or gone
            continue
        try:
            if torn(descriptor):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(descriptor)
