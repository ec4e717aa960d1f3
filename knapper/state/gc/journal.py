"""Collect one run's records: what no recovery can need any more goes, by whoever comes to it.

What may go is so for ever: it follows from numbers that only grow, never from a clock. So a collector may be cut off,
sleep, be wrong about what is newest, or work beside another, and deletes nothing that anybody will name again.

    snapshots   the two newest stay. A prefix holds an epoch: those of earlier epochs that no manifest names cannot be
                named any more, for whoever would do it has lost its slot; nor can older ones of the newest epoch.
    in/, out/   up to the second newest snapshot. Clients poll late, so answers stay for a while after their commit.
    stays       manifests and fences: a process that slept must find the slot taken that it needs next. They are one a
                claim and one a snapshot, of some 300 bytes.
"""

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from math import inf

import msgspec

from knapper.ids import RunId
from knapper.state import damage, layout
from knapper.state.journal import bundles
from knapper.state.journal.records import Commit, Manifest, decode, encode
from knapper.store import Names, Store, many

_PAGE = 999  # names of one listing, as a bucket serves them in one request
_READ_AT_ONCE = 32  # commits, of up to 4 MiB each


async def delete(store: Store, doomed: Iterable[str]) -> int:
    """Delete the objects, many at once; return how many they were."""
    return len(await many.each(doomed, store.delete))


# -- snapshots ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """`deleted`: how many snapshots. `unfinished`: those that the holder is storing, or died over."""

    deleted: int
    unfinished: list[str]


async def snapshots(store: Store, run: RunId, manifest: Manifest) -> Stored:
    """Delete the snapshots that are of no use after this manifest, whole or not.

    A manifest that is not the newest any more only finds fewer.
    """
    listed = await store.list(layout.snapshots(run))
    stored = set(map(layout.bundle_of, listed)) - {manifest.snapshot, manifest.snapshot_before}
    doomed = {prefix for prefix in stored if _is_dead(prefix, manifest)}
    for prefix in sorted(doomed):
        await bundles.delete(store, prefix)
    return Stored(len(doomed), sorted(stored - doomed))


async def release(store: Store, run: RunId, n: int, manifest: Manifest) -> None:
    """Take the claim away from a holder that seems to have died: what it left unfinished is then of an earlier epoch.

    One that lives loses nothing but its claim: it goes on until its next snapshot, and claims anew.
    """
    nobody = msgspec.structs.replace(manifest, epoch=manifest.epoch + 1, holder="", address="")
    await store.put_if_absent(layout.manifest(run, n + 1), encode(nobody))


def _is_dead(prefix: str, manifest: Manifest) -> bool:
    """Of one that the manifest does not name: whether no later one will."""
    seq, epoch = layout.parse_bundle(prefix)
    return epoch < manifest.epoch or (epoch == manifest.epoch and seq < manifest.snapshot_seq)


# -- operations and answers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollectedRecords:
    """What `records` did: how many objects, up to which out record, and when the next commit is old enough."""

    count: int = 0
    out: int = 0
    next_at: float = inf


async def records(
    store: Store,
    run: RunId,
    manifest: Manifest,
    *,
    now: float,
    keep_s: float,
    needed: float = inf,
    after: int = 0,
    first: Callable[[], Awaitable[None]] | None = None,
) -> CollectedRecords:
    """Delete operations and their answers up to the second newest snapshot, so long after their commit.

    `needed`: the lowest operation whose answer somebody will ask for, whenever that may be. `after`: out records up to
    here are known to be gone, or fences. `first` is done before any goes.
    """
    gone = CollectedRecords(out=after)
    while gone.out < manifest.snapshot_before_out:
        listed = await store.list(layout.commits(run), start_after=layout.commit(run, gone.out), limit=_PAGE)
        page = [name for name in listed if layout.last_number(name) <= manifest.snapshot_before_out]
        for at in range(0, len(page), _READ_AT_ONCE):
            some = await _old(store, page[at : at + _READ_AT_ONCE], now - keep_s, needed)
            if some.doomed and first is not None:
                await first()
                first = None
            # Operations first: what sleeps in a claim, and finds the slot of such a commit free, finds nothing to do.
            count = await _operations(store, run, some.through) + await delete(store, some.doomed)
            gone = CollectedRecords(gone.count + count, max(gone.out, some.out), some.next_at + keep_s)
            if some.stopped:
                return gone
        if not page:
            break
    return gone


@dataclass(frozen=True)
class _Old:
    """Commits that may go, which answer operations up to `through`; how far was looked, and what stopped that."""

    doomed: Names
    through: int
    out: int
    stopped: bool
    next_at: float  # when the one was committed that is not old enough


async def _old(store: Store, page: Names, before: float, needed: float) -> _Old:
    doomed: Names = []
    through, out = -1, 0
    for name, commit in zip(page, await many.each(page, lambda name: _commit(store, name)), strict=True):
        if commit is not None and commit.results:
            if commit.committed_at > before or commit.results[-1].seq >= needed:
                next_at = commit.committed_at if commit.committed_at > before else inf
                return _Old(doomed, through, out, True, next_at)
            doomed.append(name)
            through = commit.results[-1].seq
        out = layout.last_number(name)
    return _Old(doomed, through, out, False, inf)


async def _operations(store: Store, run: RunId, through: int) -> int:
    """Delete all up to this one, but for the creation."""
    count = 0
    while through > 0:
        listed = await store.list(layout.operations(run), start_after=layout.operation(run, 0), limit=_PAGE)
        page = [name for name in listed if layout.last_number(name) <= through]
        count += await delete(store, page)
        if len(page) < _PAGE:
            break
    return count


async def _commit(store: Store, name: str) -> Commit | None:
    data = await store.get(name)
    return None if data is None else decode(data, Commit, name)


# -- all of it ---------------------------------------------------------------------------------------------------------


async def remains(store: Store, run: RunId, *, keep_creation: bool) -> int:
    """Delete what is left of a run that has ended, but for its end and its fences. Return how many objects.

    `knapper.state.journal.ends.end` came first: nothing of it comes back.
    """
    kept = {layout.operation(run, 0)} if keep_creation else set[str]()
    listed = [name for name in await store.list(layout.run_prefix(run)) if name not in kept]
    commits = [name for name in listed if name.startswith(layout.commits(run))]
    fences = set[str]()
    for at in range(0, len(commits), _READ_AT_ONCE):
        some = commits[at : at + _READ_AT_ONCE]
        found = await many.each(some, lambda name: damage.unless(_commit(store, name), None))
        fences |= {name for name, commit in zip(some, found, strict=True) if commit is None or not commit.results}
    doomed = [name for name in listed if name not in fences and not name.startswith(layout.ends(run))]
    # Commits last: what slept in a claim needs its operations, and finds them gone.
    doomed.sort(key=lambda name: name.startswith(layout.commits(run)))
    return await delete(store, doomed)
