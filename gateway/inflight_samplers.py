"""Samplers of kind inflight: those of a run share weights, and each new inflight save moves all of them on.

A sample takes the newest weights when it begins and keeps them to its end, so one client's samples may differ in their
weights, and one sample's tokens never do.
"""

from collections.abc import Callable

from knapper.state.sessions import Sampler, Samplers
from knapper.store.cache import LruCache

_FRESH_S = 1.0  # how long a client may go on with weights that are no longer the newest
_RUNS_MAX = 4096


class Inflight:
    """`now`: monotonic seconds."""

    def __init__(self, samplers: Samplers, now: Callable[[], float]) -> None:
        self._samplers = samplers
        self._now = now
        self._newest: LruCache[str, tuple[float, Sampler]] = LruCache(_RUNS_MAX)  # by run: looked up when, and what

    async def serving(self, sampler: Sampler) -> Sampler:
        """The sampler whose weights are used now: the newest inflight one of the run, never one older than this."""
        if sampler.kind != "inflight":
            return sampler
        looked_at, newest = self._newest.known(sampler.run) or (float("-inf"), sampler)
        if newest.seq < sampler.seq:
            newest = sampler
        if self._now() - looked_at < _FRESH_S:
            return newest
        newest = await self._samplers.inflight_after(sampler.run, newest.seq) or newest
        self._newest.keep(sampler.run, (self._now(), newest))
        return newest
