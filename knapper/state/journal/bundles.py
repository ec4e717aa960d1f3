"""Bundles: immutable groups of files (snapshots, adapters), read and written in parallel.

The index is written last, so a bundle exists as a whole or not at all.
"""

import hashlib

from knapper.errors import Corrupt, damaged
from knapper.state.journal.machine import Files
from knapper.state.journal.records import Index, Part, Spec, decode, encode
from knapper.state.layout import INDEX
from knapper.store import Store, many


async def write(store: Store, prefix: str, files: Files, *, spec: Spec, seq: int, epoch: int, step: int = -1) -> Index:
    """Store the bundle. A repetition is harmless: the owner of a prefix always writes the same bytes."""

    async def write_part(name: str) -> Part:
        content = bytes(files[name])
        sha256 = await many.off_loop(_sha256, content)
        await store.put_if_absent(prefix + name, content)
        return Part(name=name, size=len(content), sha256=sha256)

    parts = await many.each(sorted(files), write_part)
    index = Index(spec=spec, seq=seq, epoch=epoch, parts=parts, step=step)
    await store.put_if_absent(prefix + INDEX, encode(index))
    return index


async def read_index(store: Store, prefix: str) -> Index | None:
    """The index, or None if the bundle is unfinished or deleted."""
    data = await store.get(prefix + INDEX)
    return None if data is None else decode(data, Index, prefix + INDEX)


async def read(store: Store, prefix: str, only: frozenset[str] | None = None) -> tuple[Index, dict[str, bytes]]:
    """The bundle's files (all, or those in `only`), verified.

    Raises Corrupt if a file is missing or differs from the index.
    """
    index = await read_index(store, prefix)
    if index is None:
        raise Corrupt(f"bundle {prefix} has no index: it was never finished, or was deleted")
    parts = [part for part in index.parts if only is None or part.name in only]
    contents = await many.each(parts, lambda part: _read(store, prefix, part))
    return index, {part.name: content for part, content in zip(parts, contents, strict=True)}


async def read_part(store: Store, prefix: str, index: Index, name: str) -> bytes:
    """One of the bundle's files, verified. Raises Corrupt."""
    part = next((part for part in index.parts if part.name == name), None)
    if part is None:
        raise Corrupt(f"bundle {prefix} has no file {name}")
    return await _read(store, prefix, part)


async def _read(store: Store, prefix: str, part: Part) -> bytes:
    """Verified off the event loop: it may be large."""
    data = await store.get(prefix + part.name)
    if data is None or len(data) != part.size or await many.off_loop(_sha256, data) != part.sha256:
        problem = "missing" if data is None else f"{len(data)} bytes that are others"
        raise damaged(prefix + part.name, f"it is {problem}; its index says {part.size} bytes of a known hash")
    return data


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


async def delete(store: Store, prefix: str) -> None:
    """Delete the bundle, its index first: readers see all of it or nothing."""
    await store.delete(prefix + INDEX)
    for name in await store.list(prefix):
        await store.delete(name)
