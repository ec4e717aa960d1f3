"""The order in which sequences start: fair between tenants, and between the adapters of a tenant.

The core decodes `slots_max` sequences at once and queues none, so that all waiting happens here. A free slot goes to
the tenant with the fewest active sequences, there to the adapter with the fewest, then to the sequence that waits
longest. A request waits with one sequence at a time, so few wait.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_PATIENCE: Final = 64  # sequences that may pass one that only lacks a slot for its adapter; then all wait for it


@dataclass(eq=False)
class _Waiter:
    tenant: str
    adapter: str  # empty: the base model
    number: int
    ready: asyncio.Future[None]
    passed: int = 0  # sequences that started before it although it was first


class SlotQueue:
    """At most `adapters_max` different adapters are active at once."""

    def __init__(self, slots_max: int, adapters_max: int) -> None:
        self._slots_max, self._adapters_max = slots_max, adapters_max
        self._waiting: list[_Waiter] = []
        self._numbers = itertools.count()
        self._of_tenant: Counter[str] = Counter()  # active sequences; no entry is zero
        self._of_adapter: Counter[tuple[str, str]] = Counter()

    @property
    def active(self) -> int:
        """Active sequences."""
        return self._of_tenant.total()

    async def take(self, tenant: str, adapter: str) -> Callable[[object], None]:
        """Waits for the sequence's turn. Call the result once the sequence has ended."""
        waiter = _Waiter(tenant, adapter, next(self._numbers), asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        self._grant()
        try:
            await waiter.ready
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:  # it was granted at this very moment
                self._release(waiter)
            raise
        return lambda _: self._release(waiter)

    def _release(self, waiter: _Waiter) -> None:
        self._count(waiter, -1)
        self._grant()

    def _count(self, waiter: _Waiter, by: int) -> None:
        self._of_tenant[waiter.tenant] += by
        self._of_adapter[waiter.tenant, waiter.adapter] += by
        self._of_tenant, self._of_adapter = +self._of_tenant, +self._of_adapter

    def _grant(self) -> None:
        while self._waiting and self.active < self._slots_max:
            waiter = self._next()
            if waiter is None:
                return
            self._waiting.remove(waiter)
            self._count(waiter, 1)
            if not waiter.ready.done():
                waiter.ready.set_result(None)

    def _next(self) -> _Waiter | None:
        """None: no waiting sequence may start now."""
        first = min(self._waiting, key=self._rank)
        loaded = {adapter for _, adapter in self._of_adapter if adapter}

        def fits(waiter: _Waiter) -> bool:
            return not waiter.adapter or waiter.adapter in loaded or len(loaded) < self._adapters_max

        if fits(first):
            return first
        if first.passed >= _PATIENCE:
            return None
        other = min(filter(fits, self._waiting), key=self._rank, default=None)
        if other is not None:
            first.passed += 1
        return other

    def _rank(self, waiter: _Waiter) -> tuple[int, int, int]:
        return self._of_tenant[waiter.tenant], self._of_adapter[waiter.tenant, waiter.adapter], waiter.number
