"""Reads results from the store: at most one read per run at a time, however many polls wait for it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from knapper.ids import RunId
from knapper.state.journal.records import Result
from knapper.state.journal.results import Results
from knapper.store.cache import LruCache

_FRESH_S = 0.9  # polls repeat every second
_STREAMED_FRESH_S = 20.0  # the holder streams its commits: the store is read only for one that the stream missed
_RUNS_MAX = 4096


@dataclass
class _LastRead:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    at: float = float("-inf")


class ResultReader:
    """`expects_commits`: whether a run's holder now streams its commits to this gateway. `now`: monotonic seconds."""

    def __init__(self, results: Results, expects_commits: Callable[[RunId], bool], now: Callable[[], float]) -> None:
        self._results = results
        self._expects_commits = expects_commits
        self._now = now
        self._last_reads: LruCache[RunId, _LastRead] = LruCache(_RUNS_MAX)

    async def find(self, run: RunId, seq: int) -> Result | None:
        """The result of operation `seq`, or None if it was not committed a moment ago."""
        if (result := self._results.known(run, seq)) is not None:
            return result
        if (last_read := self._last_reads.known(run)) is None:
            self._last_reads.keep(run, last_read := _LastRead())
        async with last_read.lock:
            if (result := self._results.known(run, seq)) is not None:
                return result
            if seq > self._results.applied(run) and self._now() - last_read.at < self._fresh_s(run):
                return None
            result = await self._results.find(run, seq)
            last_read.at = self._now()
            return result

    def _fresh_s(self, run: RunId) -> float:
        return _STREAMED_FRESH_S if self._expects_commits(run) and self._results.complete(run) else _FRESH_S
