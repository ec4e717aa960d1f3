"""Collects the records of one run that no recovery can need any more.

Garbage stays garbage: it follows from numbers that only grow, never from a clock. So a collector may be interrupted,
sleep, have a stale view, or work beside another one, and it deletes nothing that is ever referred to again.

    snapshots   the two newest stay. A prefix has its epoch: a snapshot of an earlier epoch that no manifest names can
                never be named, since its writer has lost its slot; nor can an older one of the newest epoch.
    in/, out/   up to the second newest snapshot. Clients poll late, so results stay for a while after their commit.
    kept        manifests and fences: a process that slept must find the slot taken that it needs next. There is one
                for each claim and for each snapshot, of some 300 bytes.
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

_PAGE = 999  # names a listing, as a bucket returns them in one request
_READ_AT_ONCE = 32  # commits, of up to 4 MiB each


async def delete(store: Store, doomed: Iterable[str]) -> int:
    """Delete the objects, many at once; return how many."""
    return len(await many.each(doomed, store.delete))


# -- snapshots ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """`deleted`: how many snapshots. `unfinished`: those that the holder is storing, or died while storing."""

    deleted: int
    unfinished: list[str]


async def snapshots(store: Store, run: RunId, manifest: Manifest) -> Stored:
    """Delete the snapshots that this manifest supersedes, finished or not. With an old manifest it finds fewer."""
    names = await store.list(layout.snapshots(run))
    stored = set(map(layout.bundle_of, names)) - {manifest.snapshot, manifest.snapshot_before}
    doomed = {prefix for prefix in stored if _is_dead(prefix, manifest)}
    for prefix in sorted(doomed):
        await bundles.delete(store, prefix)
    return Stored(len(doomed), sorted(stored - doomed))


async def release(store: Store, run: RunId, n: int, manifest: Manifest) -> None:
    """End the claim of a holder that seems dead, so that its unfinished snapshot is of an earlier epoch.

    A holder that is alive loses only its claim: it works until its next snapshot, and then claims again.
    """
    unclaimed = msgspec.structs.replace(manifest, epoch=manifest.epoch + 1, holder="", address="")
    await store.put_if_absent(layout.manifest(run, n + 1), encode(unclaimed))


def _is_dead(prefix: str, manifest: Manifest) -> bool:
    """Whether no later manifest will name the snapshot, which this one does not name."""
    seq, epoch = layout.parse_bundle(prefix)
    return epoch < manifest.epoch or (epoch == manifest.epoch and seq < manifest.snapshot_seq)


# -- operations and answers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CollectedRecords:
    """Deleted objects, the out record up to which they went, and when the next commit is old enough."""

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
    """Delete operations and results up to the second newest snapshot, `keep_s` after their commit.

    `needed`: the lowest operation whose result a job will still read. `after`: out records up to here are gone, or
    fences. `first` is called before the first deletion.
    """
    collected = CollectedRecords(out=after)
    while collected.out < manifest.snapshot_before_out:
        names = await store.list(layout.commits(run), start_after=layout.commit(run, collected.out), limit=_PAGE)
        page = [name for name in names if layout.last_number(name) <= manifest.snapshot_before_out]
        for at in range(0, len(page), _READ_AT_ONCE):
            old = await _old(store, page[at : at + _READ_AT_ONCE], now - keep_s, needed)
            if old.doomed and first is not None:
                await first()
                first = None
            # Operations first: a claim that slept and finds the slot of such a commit free then has nothing to apply.
            count = await _operations(store, run, old.through) + await delete(store, old.doomed)
            collected = CollectedRecords(collected.count + count, max(collected.out, old.out), old.next_at + keep_s)
            if old.stopped:
                return collected
        if not page:
            break
    return collected


@dataclass(frozen=True)
class _Old:
    """Commits to delete, with results up to operation `through`; the last record read; whether a young one follows."""

    doomed: Names
    through: int
    out: int
    stopped: bool
    next_at: float  # when the first young one was committed


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
    """Delete the operations up to this one, except the creation."""
    count = 0
    while through > 0:
        names = await store.list(layout.operations(run), start_after=layout.operation(run, 0), limit=_PAGE)
        page = [name for name in names if layout.last_number(name) <= through]
        count += await delete(store, page)
        if len(page) < _PAGE:
            break
    return count


async def _commit(store: Store, name: str) -> Commit | None:
    data = await store.get(name)
    return None if data is None else decode(data, Commit, name)


# -- a run that has ended ----------------------------------------------------------------------------------------------


async def remains(store: Store, run: RunId, *, keep_creation: bool) -> int:
    """Delete the objects of a run that has ended, except its End record and its fences. Return how many.

    Call `knapper.state.journal.ends.end` first, so that no process brings any of them back.
    """
    kept = {layout.operation(run, 0)} if keep_creation else set[str]()
    names = [name for name in await store.list(layout.run_prefix(run)) if name not in kept]
    commits = [name for name in names if name.startswith(layout.commits(run))]
    fences = set[str]()
    for at in range(0, len(commits), _READ_AT_ONCE):
        group = commits[at : at + _READ_AT_ONCE]
        records = await many.each(group, lambda name: damage.unless(_commit(store, name), None))
        fences |= {name for name, commit in zip(group, records, strict=True) if commit is None or not commit.results}
    doomed = [name for name in names if name not in fences and not name.startswith(layout.ends(run))]
    # Commits last: a claim that slept then finds its operations gone.
    doomed.sort(key=lambda name: name.startswith(layout.commits(run)))
    return await delete(store, doomed)
