"""A store that fails as real ones do, by the throw of a seeded die: one seed, one history of faults.

    store = FaultyStore(MemoryStore(), random.Random(7), Rates.everywhere(0.05))

Whatever it does keeps the promises of `knapper.store.Store`, but for two faults that can be asked for: `lag` (a listing
does not show yet what was just written) and `precondition` (a writer hears that its own object was there first).
Neither may ever become a wrong result.
"""

import asyncio
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields

from knapper.errors import StoreError
from knapper.store import Names, Store

_LAGGING_MAX = 16  # the newest objects, which a lagging listing may not show
_SLOW_S = 2.0


@dataclass(frozen=True)
class Rates:
    """How likely each fault is, for each call that can meet it."""

    unavailable: float = 0.0  # 5xx: nothing happened
    too_many: float = 0.0  # 429: nothing happened
    timeout_before: float = 0.0  # the request never arrived
    timeout_after: float = 0.0  # it did, and was obeyed; its answer never came
    precondition: float = 0.0  # 412 for a write of one's own, which had arrived before
    torn: float = 0.0  # the body broke off, and was noticed
    slow: float = 0.0
    lag: float = 0.0  # a listing does not show some of the newest objects

    @staticmethod
    def everywhere(rate: float) -> "Rates":
        """Every fault alike."""
        return Rates(**{field.name: rate for field in fields(Rates)})


class FaultyStore:
    """`inner`, with faults. `pause` is what a slow transfer waits with."""

    def __init__(
        self,
        inner: Store,
        rng: random.Random,
        rates: Rates,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.injected: Counter[str] = Counter()  # what happened so far
        self.refusal = ""  # while it says something, nothing is written: "the disk is full", "the bucket is read-only"
        self.rates = rates
        self._inner = inner
        self._rng = rng
        self._pause = pause
        self._newest: deque[str] = deque(maxlen=_LAGGING_MAX)

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        self._refuse(name)
        await self._before(f"write {name}")
        won = await self._inner.put_if_absent(name, data)
        if won:
            self._newest.append(name)
            if self._meets("precondition"):
                return False
        self._after(f"write {name}")
        return won

    async def get(self, name: str) -> bytes | None:
        await self._before(f"read {name}")
        data = await self._inner.get(name)
        if data is not None and self._meets("torn"):
            raise StoreError(f"cannot read {name}: the body broke off after {len(data) // 2} of {len(data)} bytes")
        return data

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        await self._before(f"list {prefix}")
        if not self._meets("lag"):
            return await self._inner.list(prefix, start_after, limit)
        hidden = {name for name in self._newest if self._rng.random() < 0.5}
        shown = [name for name in await self._inner.list(prefix, start_after) if name not in hidden]
        return shown[:limit] if limit else shown

    async def delete(self, name: str) -> None:
        self._refuse(name)
        await self._before(f"delete {name}")
        await self._inner.delete(name)
        self._after(f"delete {name}")

    def _refuse(self, name: str) -> None:
        if self.refusal:
            self.injected["refused"] += 1
            raise StoreError(f"cannot write {name}: {self.refusal}", retry_after_s=5.0)

    async def _before(self, doing: str) -> None:
        if self._meets("slow"):
            await self._pause(_SLOW_S * self._rng.random())
        if self._meets("unavailable"):
            raise StoreError(f"cannot {doing}: 503 backend error")
        if self._meets("too_many"):
            raise StoreError(f"cannot {doing}: 429 rate limit exceeded")
        if self._meets("timeout_before"):
            raise StoreError(f"cannot {doing}: timed out")

    def _after(self, doing: str) -> None:
        if self._meets("timeout_after"):
            raise StoreError(f"cannot {doing}: timed out, and it is unknown whether it happened")

    def _meets(self, fault: str) -> bool:
        rate: float = getattr(self.rates, fault)
        met = rate > 0 and self._rng.random() < rate
        self.injected[fault] += met
        return met


class SteppingClock:
    """Seconds that now and then jump by up to a day, back or ahead, and go on from there."""

    def __init__(self, clock: Callable[[], float], rng: random.Random, rate: float) -> None:
        self.steps = 0
        self._clock = clock
        self._rng = rng
        self._rate = rate
        self._off_s = 0.0

    def __call__(self) -> float:
        if self._rng.random() < self._rate:
            self.steps += 1
            self._off_s = self._rng.uniform(-86400.0, 86400.0)
        return self._clock() + self._off_s
