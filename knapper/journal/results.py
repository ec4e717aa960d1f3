"""Published answers, read from the `out` records. Whatever is seen here is durable and never changes."""

from collections import OrderedDict
from dataclasses import dataclass, field

from knapper.ids import RunId
from knapper.journal import names
from knapper.journal.records import Commit, Result, decode
from knapper.store import Store

_CACHE_BYTES_MAX = 256 * 1024 * 1024


@dataclass
class _Seen:
    """What is known of one run's commits.

    Every out record in (low, high] has been read; `where` says which one answers a seq.
    """

    low: int = -1  # -1: nothing was read yet
    high: int = 0
    applied: int = -1
    where: dict[int, int] = field(default_factory=dict)


class Results:
    """Finds the answer to an operation; remembers the recent ones. Safe to lose: the store has everything."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[RunId, _Seen] = {}
        self._commits: OrderedDict[tuple[RunId, int], Commit] = OrderedDict()
        self._bytes = 0

    async def find(self, run: RunId, seq: int) -> Result | None:
        """The answer to operation `seq`, or None while there is none. Looks in the store for whatever is new."""
        if (known := self.known(run, seq)) is not None:
            return known
        seen = self._seen.setdefault(run, _Seen())
        await self._read_new(run, seen)
        # While no answer was seen at all, nothing but fences was: whoever claims leaves one behind.
        while seq not in seen.where and (seq <= seen.applied or seen.applied < 0) and seen.low > 0:
            await self._read_older(run, seen)
        if (n := seen.where.get(seq)) is not None:
            return self._answer(await self._commit(run, n), seq)
        if seq <= seen.applied and seen.low == 0:  # applied, and swept since
            error = b'{"error":"the result of this operation was kept for 7 days and is gone","category":"user"}'
            return Result(seq=seq, sha256=b"", content_type="application/json", body=error, failed=True)
        return None

    def known(self, run: RunId, seq: int) -> Result | None:
        """The answer if it lies in memory; never looks in the store."""
        seen = self._seen.get(run)
        if seen is None or (n := seen.where.get(seq)) is None or (commit := self._commits.get((run, n))) is None:
            return None
        self._commits.move_to_end((run, n))
        return self._answer(commit, seq)

    def applied(self, run: RunId) -> int:
        """The newest operation whose answer was seen; -1 if none was."""
        seen = self._seen.get(run)
        return -1 if seen is None else seen.applied

    def offer(self, run: RunId, n: int, commit: Commit) -> None:
        """Take in a durable commit that its holder pushed, which saves reading it."""
        seen = self._seen.setdefault(run, _Seen())
        self._learn(run, seen, n, commit)
        if n == seen.high + 1 and seen.low >= 0:
            seen.high = n

    def forget(self, run: RunId) -> None:
        """Free the memory; the store still knows."""
        if (seen := self._seen.pop(run, None)) is not None:
            for n in set(seen.where.values()):
                if (commit := self._commits.pop((run, n), None)) is not None:
                    self._bytes -= _size(commit)

    async def _read_new(self, run: RunId, seen: _Seen) -> None:
        listed = await self._store.list(names.commits(run), start_after=names.commit(run, seen.high))
        if not listed:
            return
        last = names.last_number(listed[-1])
        if seen.low < 0:  # first sight: begin at the end, for that is what clients ask about
            seen.low = seen.high = last - 1
        while seen.high < last:  # by number: what a listing leaves out is read all the same
            n = seen.high + 1
            await self._commit(run, n)
            seen.high = max(seen.high, n)

    async def _read_older(self, run: RunId, seen: _Seen) -> None:
        name = names.commit(run, seen.low)
        if await self._store.get(name) is None:  # swept: nothing but fences lies below
            seen.low = 0
            return
        await self._commit(run, seen.low)
        seen.low -= 1

    async def _commit(self, run: RunId, n: int) -> Commit:
        if (commit := self._commits.get((run, n))) is not None:
            return commit
        name = names.commit(run, n)
        data = await self._store.get(name)
        commit = decode(data, Commit, name) if data is not None else Commit(epoch=0, results=[])
        self._learn(run, self._seen.setdefault(run, _Seen()), n, commit)
        return commit

    def _learn(self, run: RunId, seen: _Seen, n: int, commit: Commit) -> None:
        for result in commit.results:
            seen.where[result.seq] = n
            seen.applied = max(seen.applied, result.seq)
        if (run, n) not in self._commits:
            self._commits[run, n] = commit
            self._bytes += _size(commit)
        while self._bytes > _CACHE_BYTES_MAX and len(self._commits) > 1:
            _, evicted = self._commits.popitem(last=False)
            self._bytes -= _size(evicted)

    @staticmethod
    def _answer(commit: Commit, seq: int) -> Result | None:
        return next((result for result in commit.results if result.seq == seq), None)


def _size(commit: Commit) -> int:
    return 200 + sum(200 + len(result.body) for result in commit.results)
