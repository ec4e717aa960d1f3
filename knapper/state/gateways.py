"""Gateways: where each one that keeps samples is reached by the others, as names in the store.

A name, <microseconds>-<address in hexadecimal>, is there before the first sample is acknowledged, is renewed while
samples are kept, and deleted when none are: an idle gateway has none. One that was not renewed is of a gateway that
died. Addresses come from the settings of the gateway that wrote them, never from a request.
"""

import asyncio
from collections.abc import Callable
from typing import Final

from knapper.state import damage
from knapper.state.layout import ObjectKind
from knapper.store import Store

RENEWED_S: Final = 60.0
KEPT_S: Final = 180.0


class Gateways:
    """`gateway`: the random name of this process. `address`: its URL; empty if it has none. `clock`: seconds."""

    def __init__(self, store: Store, gateway: str, address: str, clock: Callable[[], float]) -> None:
        self._store, self._gateway, self._address, self._clock = store, gateway, address, clock
        self._own = ""
        self._written_at = 0.0
        self._known: dict[str, tuple[str, float]] = {}  # gateway -> (address, when it was read)
        self._lock = asyncio.Lock()

    async def publish(self) -> None:
        """Show where this gateway is, unless that was done lately. Raises StoreError."""
        async with self._lock:
            at, before = self._clock(), self._own
            if not self._address or (before and abs(at - self._written_at) < RENEWED_S):
                return
            name = ObjectKind.GATEWAY.key(self._gateway, int(at * 1e6), self._address.encode().hex())
            await self._store.put_if_absent(name, b"")
            self._own, self._written_at = name, at
            if before and before != name:
                await self._store.delete(before)

    async def withdraw(self, idle: Callable[[], bool] = lambda: True) -> None:
        """Nothing is kept here, if `idle` says so now."""
        async with self._lock:
            if self._own and idle():
                name, self._own = self._own, ""
                await self._store.delete(name)

    async def address_of(self, gateway: str) -> str:
        """The URL of another gateway; empty if it is gone, or is this one. Raises StoreError."""
        if gateway == self._gateway:
            return ""
        now = self._clock()
        self._known = {each: (url, at) for each, (url, at) in self._known.items() if abs(now - at) < RENEWED_S}
        if gateway not in self._known:
            found = await self._live(ObjectKind.GATEWAY.under(gateway))
            if not found:
                return ""
            self._known[gateway] = found[-1], now
        return self._known[gateway][0]

    async def delete_stale(self) -> None:
        """Delete the names of gateways that died."""
        await self._live(ObjectKind.GATEWAY.under())

    async def _live(self, prefix: str) -> list[str]:
        """The addresses below the prefix, the newest of a gateway last. Deletes those that are no longer renewed."""
        live = []
        for name in damage.parsed(await self._store.list(prefix), _parse):
            key, at_us, address = name
            if abs(self._clock() - at_us / 1e6) < KEPT_S:
                live.append(address)
            else:
                await self._store.delete(key)
        return live


def _parse(key: str) -> tuple[str, int, str]:
    """(key, microseconds, address). Raises ValueError for a malformed name."""
    _, at_us, address = ObjectKind.GATEWAY.parse(key)
    return key, int(at_us), bytes.fromhex(address).decode()
