"""Published answers, read from the `out` records. Whatever is seen here is durable and never changes."""

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
        "error": "the result of this operation is gone: nobody asked for it in time (KNAPPER_KEEP_RESULTS_S says how "
        "long one is kept after its commit); what it did to the run stays",
        "category": "user",
    }
)
_BEHIND_MAX = 1000  # more records than that, and reading begins anew at the end
_SWEPT, _UNREADABLE = 0, -1  # the epoch of a record that is gone, and of one that is damaged; claims count from 1


@dataclass
class _Seen:
    """What is known of one run's commits.

    Every out record in (low, high] has been read; `where` says which one answers a seq. `told`: the newest that anybody
    told of, read or not.
    """

    low: int = -1  # -1: nothing was read yet
    high: int = 0
    told: int = 0
    applied: int = -1
    where: dict[int, int] = field(default_factory=dict)
    damaged: dict[int, KnapperError] = field(default_factory=dict)  # records that cannot be read, and why


class Results:
    """Finds the answer to an operation; remembers the recent ones. Safe to lose: the store has everything."""

    def __init__(self, store: Store, manifests: Manifests | None = None) -> None:
        self._store = store
        self._manifests = manifests or Manifests(store)
        self._seen: dict[RunId, _Seen] = {}
        self._commits: LruCache[tuple[RunId, int], Commit] = LruCache(_CACHE_BYTES_MAX, _size)

    async def find(self, run: RunId, seq: int) -> Result | None:
        """The answer to operation `seq`, or None while there is none. Looks in the store for whatever is new.

        Raises Corrupt or NewerFormat if the answer may lie in a record that cannot be read.
        """
        if (known := self.known(run, seq)) is not None:
            return known
        seen = self._seen.setdefault(run, _Seen())
        await self._read_new(run, seen)
        while seen.applied < 0 and seen.low > 0:  # nothing but fences was seen: whoever claims leaves one behind
            await self._read_older(run, seen)
        if seq <= seen.applied and seq not in seen.where and seen.low > 0:
            await self._search(run, seen, seq)
        if seq not in seen.where and self._may_lie_in_damaged(seen, seq):
            await self._read_damaged(run, seen)
        if (n := seen.where.get(seq)) is not None:
            return self._answer(await self._commit(run, n), seq)
        if self._may_lie_in_damaged(seen, seq):
            raise next(iter(seen.damaged.values()))
        if seq <= seen.applied:  # applied, and collected since
            return Result(seq=seq, sha256=b"", content_type="application/json", body=GONE, failed=True)
        return None

    async def device_s(self, run: RunId, seq: int) -> float:
        """Seconds of the device that the operation took, once `find` has found its answer.

        Of operations that were committed together, the first has what all took.
        """
        n = self._seen[run].where.get(seq)
        if n is None:
            return 0.0
        commit = await self._commit(run, n)
        return commit.device_s if commit.results and commit.results[0].seq == seq else 0.0

    def known(self, run: RunId, seq: int) -> Result | None:
        """The answer if it lies in memory; never looks in the store."""
        seen = self._seen.get(run)
        if seen is None or (n := seen.where.get(seq)) is None or (commit := self._commits.known((run, n))) is None:
            return None
        return self._answer(commit, seq)

    def applied(self, run: RunId) -> int:
        """The newest operation whose answer was seen; -1 if none was."""
        seen = self._seen.get(run)
        return -1 if seen is None else seen.applied

    def complete(self, run: RunId) -> bool:
        """Whether all was read that anybody told of: a look into the store finds more only if nobody told."""
        seen = self._seen.get(run)
        return seen is not None and seen.low >= 0 and seen.told <= seen.high

    def hear(self, run: RunId, n: int) -> None:
        """Record `n` is durable, says its holder."""
        seen = self._seen.setdefault(run, _Seen())
        seen.told = max(seen.told, n)

    def offer(self, run: RunId, n: int, commit: Commit) -> None:
        """Take in a durable commit that its holder pushed, which saves reading it."""
        self.hear(run, n)
        seen = self._seen[run]
        self._learn(run, seen, n, commit)
        if n == seen.high + 1 and seen.low >= 0:
            seen.high = n

    def forget(self, run: RunId) -> None:
        """Free the memory; the store still knows."""
        if (seen := self._seen.pop(run, None)) is not None:
            for n in set(seen.where.values()):
                self._commits.forget((run, n))

    async def _read_new(self, run: RunId, seen: _Seen) -> None:
        last = await (self._first_look(run) if seen.low < 0 else self._newest(run, seen.high))
        if seen.low < 0 and last == 0:  # nobody ever claimed the run: whatever comes is read from its beginning
            seen.low = seen.high = 0
        if last == 0:
            return
        if seen.low < 0 or last - seen.high > _BEHIND_MAX:  # begin at the end, for that is what clients ask about
            seen.low = seen.high = last - 1
        while seen.high < last:  # by number: what a listing leaves out is read all the same
            n = seen.high + 1
            await self._commit(run, n)
            seen.high = max(seen.high, n)

    async def _first_look(self, run: RunId) -> int:
        """The newest record, 0 if there is none. A long life costs no more than a short one: a snapshot leads there."""
        known = self._manifests.seen(run)
        if known is None:
            if not await self._store.list(layout.commits(run), limit=1):
                return 0
            known = await self._manifests.newest(run)
        snapshot_out = known[1].snapshot_out if known is not None else 0
        return await self._newest(run, snapshot_out) or snapshot_out

    async def _newest(self, run: RunId, after: int) -> int:
        """Of the records above `after`; 0 if there is none."""
        name = await newest_name(self._store, layout.commits(run), after)
        return layout.last_number(name) if name else 0

    async def _read_older(self, run: RunId, seen: _Seen) -> None:
        name = layout.commit(run, seen.low)
        if await self._store.get(name) is None:  # swept: nothing but fences lies below
            seen.low = 0
            return
        await self._commit(run, seen.low)
        seen.low -= 1

    async def _search(self, run: RunId, seen: _Seen, seq: int) -> None:
        """Read the record that answers `seq`, somewhere in [1, low], if it is there still: operations are in order."""
        above, below, step = seen.low + 1, seen.low, 1
        while below > 0 and not await self._before(run, below, seq):
            above, step = below, 2 * step
            below = max(above - step, 0)
        while above - below > 1 and seq not in seen.where:
            middle = (below + above) // 2
            if await self._before(run, middle, seq):
                below = middle
            else:
                above = middle

    async def _before(self, run: RunId, n: int, seq: int) -> bool:
        """Whether record `n` lies before the one that answers `seq`. A fence is judged by the record before it."""
        while n > 0:
            commit = await self._commit(run, n)
            if commit.results:
                return commit.results[-1].seq < seq
            if commit.epoch == _SWEPT:
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
            commit = decode(data, Commit, name) if data is not None else Commit(epoch=_SWEPT, results=[])
        except damage.ERRORS as error:  # the records around it are not to blame
            damage.tell(error)
            seen.damaged[n] = error
            return Commit(epoch=_UNREADABLE, results=[])
        self._learn(run, seen, n, commit)
        return commit

    @staticmethod
    def _may_lie_in_damaged(seen: _Seen, seq: int) -> bool:
        """Of an answer that is in no record that was read."""
        newest = max(seen.where.values(), default=0)
        return any(seq <= seen.applied or n > newest for n in seen.damaged)

    async def _read_damaged(self, run: RunId, seen: _Seen) -> None:
        """Once more: somebody may have restored them."""
        for n in list(seen.damaged):
            await self._commit(run, n)

    def _learn(self, run: RunId, seen: _Seen, n: int, commit: Commit) -> None:
        seen.damaged.pop(n, None)
        for result in commit.results:
            seen.where[result.seq] = n
            seen.applied = max(seen.applied, result.seq)
        self._commits.keep((run, n), commit)

    @staticmethod
    def _answer(commit: Commit, seq: int) -> Result | None:
        return next((result for result in commit.results if result.seq == seq), None)


def _size(commit: Commit) -> int:
    return 200 + sum(200 + len(result.body) for result in commit.results)
