"""Published results, read from the `out` records. A result that is visible here is durable and never changes."""

from dataclasses import dataclass, field

import msgspec

from knapper.errors import KnapperError
from knapper.ids import RunId
from knapper.state import damage, layout
from knapper.state.journal.newest import Manifests, newest_name
from knapper.state.journal.records import Commit, Result, decode
from knapper.store import Store
from knapper.store.cache import LruCache

_CACHE_BYTES_MAX = 256 * 1024 * 1024
GONE = msgspec.json.encode(
    {
        "error": "the result of this operation is gone: no client read it in time (KNAPPER_KEEP_RESULTS_S says how "
        "long one is kept after its commit); what it did to the run stays",
        "category": "user",
    }
)
_BEHIND_MAX = 1000  # records; a reader further behind starts again at the newest
_COLLECTED, _UNREADABLE = 0, -1  # epochs in place of a record that is gone or damaged; claims count from 1


@dataclass
class _Seen:
    """One run's commits, as far as they were read.

    Every out record in (low, high] was read; `record_of` maps a seq to the record with its result. `announced`: the
    newest record that a holder reported, read or not.
    """

    low: int = -1  # -1: nothing was read yet
    high: int = 0
    announced: int = 0
    applied: int = -1
    record_of: dict[int, int] = field(default_factory=dict)
    damaged: dict[int, KnapperError] = field(default_factory=dict)  # records that cannot be read, and why


class Results:
    """Finds results of operations, with a cache of recent ones. Safe to lose: the store has everything."""

    def __init__(self, store: Store, manifests: Manifests | None = None) -> None:
        self._store = store
        self._manifests = manifests or Manifests(store)
        self._seen: dict[RunId, _Seen] = {}
        self._commits: LruCache[tuple[RunId, int], Commit] = LruCache(_CACHE_BYTES_MAX, _size)

    async def find(self, run: RunId, seq: int) -> Result | None:
        """The result of operation `seq`, or None while there is none. Reads new records from the store.

        Raises Corrupt or NewerFormat if the result may be in a record that cannot be read.
        """
        if (cached := self.known(run, seq)) is not None:
            return cached
        seen = self._seen.setdefault(run, _Seen())
        await self._read_new(run, seen)
        while seen.applied < 0 and seen.low > 0:  # only fences so far: each claim leaves one
            await self._read_older(run, seen)
        if seq <= seen.applied and seq not in seen.record_of and seen.low > 0:
            await self._search(run, seen, seq)
        if seq not in seen.record_of and self._may_be_in_damaged(seen, seq):
            await self._read_damaged(run, seen)
        if (n := seen.record_of.get(seq)) is not None:
            return self._answer(await self._commit(run, n), seq)
        if self._may_be_in_damaged(seen, seq):
            raise next(iter(seen.damaged.values()))
        if seq <= seen.applied:  # applied, and collected since
            return Result(seq=seq, sha256=b"", content_type="application/json", body=GONE, failed=True)
        return None

    async def device_s(self, run: RunId, seq: int) -> float:
        """Device seconds of the operation, once `find` has returned its result.

        Of operations that share a commit, the first has the seconds of all.
        """
        n = self._seen[run].record_of.get(seq)
        if n is None:
            return 0.0
        commit = await self._commit(run, n)
        return commit.device_s if commit.results and commit.results[0].seq == seq else 0.0

    def known(self, run: RunId, seq: int) -> Result | None:
        """The result if it is cached; never reads the store."""
        seen = self._seen.get(run)
        if seen is None or (n := seen.record_of.get(seq)) is None or (commit := self._commits.known((run, n))) is None:
            return None
        return self._answer(commit, seq)

    def applied(self, run: RunId) -> int:
        """The newest operation whose result was read, or -1."""
        seen = self._seen.get(run)
        return -1 if seen is None else seen.applied

    def complete(self, run: RunId) -> bool:
        """Whether every announced record was read; the store may still have records that were not announced."""
        seen = self._seen.get(run)
        return seen is not None and seen.low >= 0 and seen.announced <= seen.high

    def announce(self, run: RunId, n: int) -> None:
        """The holder reports that record `n` is durable."""
        seen = self._seen.setdefault(run, _Seen())
        seen.announced = max(seen.announced, n)

    def offer(self, run: RunId, n: int, commit: Commit) -> None:
        """Cache a durable commit that its holder pushed, which saves a read."""
        self.announce(run, n)
        seen = self._seen[run]
        self._learn(run, seen, n, commit)
        if n == seen.high + 1 and seen.low >= 0:
            seen.high = n

    def forget(self, run: RunId) -> None:
        """Free the memory; the store still has the results."""
        if (seen := self._seen.pop(run, None)) is not None:
            for n in set(seen.record_of.values()):
                self._commits.forget((run, n))

    async def _read_new(self, run: RunId, seen: _Seen) -> None:
        last = await (self._first_search(run) if seen.low < 0 else self._newest(run, seen.high))
        if seen.low < 0 and last == 0:  # never claimed: later records are read from the first one
            seen.low = seen.high = 0
        if last == 0:
            return
        if seen.low < 0 or last - seen.high > _BEHIND_MAX:  # start at the newest: clients poll for recent results
            seen.low = seen.high = last - 1
        while seen.high < last:  # by number, so that a listing that lags hides none
            n = seen.high + 1
            await self._commit(run, n)
            seen.high = max(seen.high, n)

    async def _first_search(self, run: RunId) -> int:
        """The newest record, or 0. The newest snapshot bounds the search, however long the run's history is."""
        newest = self._manifests.seen(run)
        if newest is None:
            if not await self._store.list(layout.commits(run), limit=1):
                return 0
            newest = await self._manifests.newest(run)
        snapshot_out = newest[1].snapshot_out if newest is not None else 0
        return await self._newest(run, snapshot_out) or snapshot_out

    async def _newest(self, run: RunId, after: int) -> int:
        """The newest record above `after`, or 0."""
        name = await newest_name(self._store, layout.commits(run), after)
        return layout.last_number(name) if name else 0

    async def _read_older(self, run: RunId, seen: _Seen) -> None:
        name = layout.commit(run, seen.low)
        if await self._store.get(name) is None:  # collected: only fences are left below
            seen.low = 0
            return
        await self._commit(run, seen.low)
        seen.low -= 1

    async def _search(self, run: RunId, seen: _Seen, seq: int) -> None:
        """Find and read the record with the result of `seq` in [1, low], if it still exists: a binary search by seq."""
        above, below, step = seen.low + 1, seen.low, 1
        while below > 0 and not await self._before(run, below, seq):
            above, step = below, 2 * step
            below = max(above - step, 0)
        while above - below > 1 and seq not in seen.record_of:
            middle = (below + above) // 2
            if await self._before(run, middle, seq):
                below = middle
            else:
                above = middle

    async def _before(self, run: RunId, n: int, seq: int) -> bool:
        """Whether record `n` precedes the one with the result of `seq`. For a fence, the record before it decides."""
        while n > 0:
            commit = await self._commit(run, n)
            if commit.results:
                return commit.results[-1].seq < seq
            if commit.epoch == _COLLECTED:
                break
            n -= 1
        return True

    async def _commit(self, run: RunId, n: int) -> Commit:
        if (commit := self._commits.known((run, n))) is not None:
            return commit
        name = layout.commit(run, n)
        data = await self._store.get(name)
        seen = self._seen.setdefault(run, _Seen())
        try:
            commit = decode(data, Commit, name) if data is not None else Commit(epoch=_COLLECTED, results=[])
        except damage.ERRORS as error:  # the other records stay readable
            damage.report(error)
            seen.damaged[n] = error
            return Commit(epoch=_UNREADABLE, results=[])
        self._learn(run, seen, n, commit)
        return commit

    @staticmethod
    def _may_be_in_damaged(seen: _Seen, seq: int) -> bool:
        """Whether a result that no record has may be in a damaged one."""
        newest = max(seen.record_of.values(), default=0)
        return any(seq <= seen.applied or n > newest for n in seen.damaged)

    async def _read_damaged(self, run: RunId, seen: _Seen) -> None:
        """Read the damaged records again: an operator may have restored them."""
        for n in list(seen.damaged):
            await self._commit(run, n)

    def _learn(self, run: RunId, seen: _Seen, n: int, commit: Commit) -> None:
        seen.damaged.pop(n, None)
        for result in commit.results:
            seen.record_of[result.seq] = n
            seen.applied = max(seen.applied, result.seq)
        self._commits.keep((run, n), commit)

    @staticmethod
    def _answer(commit: Commit, seq: int) -> Result | None:
        return next((result for result in commit.results if result.seq == seq), None)


def _size(commit: Commit) -> int:
    return 200 + sum(200 + len(result.body) for result in commit.results)
