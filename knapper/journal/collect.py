"""Sweep one run: what two snapshots have made unnecessary, and late pollers no longer want."""

from collections.abc import AsyncIterator

from knapper import limits
from knapper.ids import RunId, run_of
from knapper.journal import bundles, names
from knapper.journal.accept import newest_manifest
from knapper.journal.records import Commit, Operation, decode
from knapper.store import Store


async def sweep_all(store: Store, now: float) -> AsyncIterator[tuple[RunId, int]]:
    """Sweep every run of the store; yield each with the number of objects that were deleted."""
    for run in sorted({run_of(name) for name in await store.list("runs/")}):
        yield run, await sweep(store, run, now)


async def sweep(store: Store, run: RunId, now: float) -> int:
    """Delete operations, results and snapshots below the second newest snapshot that are older than seven days.

    Return how many.

    Fences, manifests and operation 0 stay for ever: a process that slept through the sweep must still meet them. May
    be cut off and
    repeated at any point, beside anything else.
    """
    newest = await newest_manifest(store, run)
    if newest is None or not newest[1].snapshot_before:
        return 0
    manifest = newest[1]
    swept = 0
    old_seq = manifest.snapshot_before_seq  # up to here operations are old enough, or swept already
    for name in await store.list(names.operations(run), start_after=names.operation(run, 0)):
        seq = names.last_number(name)
        if seq > manifest.snapshot_before_seq:
            break
        data = await store.get(name)
        if data is not None and now - decode(data, Operation, name).accepted_at < limits.collect_after_s:
            old_seq = seq - 1
            break
        await store.delete(name)
        swept += 1
    for name in await store.list(names.commits(run)):
        if names.last_number(name) > manifest.snapshot_before_out:
            break
        data = await store.get(name)
        results = decode(data, Commit, name).results if data is not None else []
        if results and results[-1].seq <= old_seq:
            await store.delete(name)
            swept += 1
    for prefix in sorted({name.rpartition("/")[0] + "/" for name in await store.list(names.snapshots(run))}):
        seq = int(prefix.removeprefix(names.snapshots(run)).partition("-")[0])
        if seq < manifest.snapshot_before_seq:
            await bundles.delete(store, prefix)
            swept += 1
    return swept
