"""Look into the store for results: once a run and moment, however many polls wait for it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from knapper.ids import RunId
from knapper.state.journal.records import Result
from knapper.state.journal.results import Results
from knapper.store.cache import LruCache

_FRESH_S = 0.9  # polls look again every second
_TOLD_S = 20.0  # while the holder tells of each commit, a look is only for what it should have told, and did not
_RUNS_MAX = 4096


@dataclass
class _Look:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    at: float = float("-inf")


class ResultReader:
    """`told`: whether a run's holder tells of what it commits at this moment. `now`: monotonic seconds."""

    def __init__(self, results: Results, told: Callable[[RunId], bool], now: Callable[[], float]) -> None:
        self._results = results
        self._told = told
        self._now = now
        self._looks: LruCache[RunId, _Look] = LruCache(_RUNS_MAX)

    async def find(self, run: RunId, seq: int) -> Result | None:
        """The answer to operation `seq`, or None if there was none a moment ago."""
        if (known := self._results.known(run, seq)) is not None:
            return known
        if (look := self._looks.known(run)) is None:
            self._looks.keep(run, look := _Look())
        async with look.lock:
            if (known := self._results.known(run, seq)) is not None:
                return known
            if seq > self._results.applied(run) and self._now() - look.at < self._fresh_s(run):
                return None
            found = await self._results.find(run, seq)
            look.at = self._now()
            return found

    def _fresh_s(self, run: RunId) -> float:
        return _TOLD_S if self._told(run) and self._results.complete(run) else _FRESH_S
