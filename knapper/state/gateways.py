"""Gateways: where each one that takes samples is reached by the others, as names in the store.

A name, <microseconds>-<address in hexadecimal>, is written before the gateway acknowledges a sample, and deleted when
it has long taken none: an idle gateway has none. Clocks may be apart: the time in it is compared with those of other
names and of sessions, never with the clock here. A name of a gateway that died is deleted by who finds nobody there;
one that lives all the same writes another. Addresses come from the settings of the gateway that wrote them, never from
a request.
"""

import asyncio
import hashlib
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Final

from knapper.state import damage
from knapper.state.layout import ObjectKind
from knapper.store import Store

LISTED_S: Final = 60.0  # how old the list of the others may be
SETTLED_S: Final = 2 * LISTED_S  # after it a newcomer is in the list of each
IDLE_S: Final = 600.0


@dataclass(frozen=True)
class Member:
    """A gateway that takes samples. `since_us`: when it began to, in microseconds by its own clock, but never before
    those that it found there.
    """

    gateway: str
    since_us: int
    address: str
    name: str  # in the store


class Gateways:
    """`gateway`: the random name of this process. `address`: its URL; empty if it has none, and then it has no others.

    `clock`: seconds since the epoch; `now`: monotonic seconds.
    """

    def __init__(
        self, store: Store, gateway: str, address: str, clock: Callable[[], float], now: Callable[[], float]
    ) -> None:
        self.gateway, self.address = gateway, address
        self._store, self._clock, self._now = store, clock, now
        self._own = ""
        self._members: dict[str, Member] = {}
        self._listed_at = self._used_at = float("-inf")
        self._lock = asyncio.Lock()

    async def publish(self) -> None:
        """Show where this gateway is, and know the others. Raises StoreError."""
        self._used_at = self._now()
        if not self.address or (self._own and self._fresh):
            return
        async with self._lock:
            if self._own and self._fresh:
                return
            await self._list()
            if self.gateway not in self._members or not self._own:
                after_us = max((member.since_us for member in self._members.values()), default=0)
                at_us = max(int(self._clock() * 1e6), after_us + 1)
                name = ObjectKind.GATEWAY.key(self.gateway, at_us, self.address.encode().hex())
                await self._store.put_if_absent(name, b"")
                self._own = name
                await self._list()  # who came at the same time is seen, or sees this one

    async def withdraw(self, idle: Callable[[], bool]) -> None:
        """This gateway keeps no sample, if `idle` says so now, and has taken none for a while."""
        async with self._lock:
            if self._own and idle() and self._now() - self._used_at >= IDLE_S:
                await self._forget_own()

    async def leave(self) -> None:
        """This gateway ends."""
        async with self._lock:
            if self._own:
                await self._forget_own()

    async def others(self) -> list[Member]:
        """Raises StoreError."""
        if not self.address:
            return []
        if not self._fresh:
            await self._list_after(self._now())
        return [member for member in self._members.values() if member.gateway != self.gateway]

    async def find(self, gateway: str) -> Member | None:
        """Another gateway; None if there is none of this name. Raises StoreError."""
        if not self.address or gateway == self.gateway:
            return None
        if gateway not in self._members or not self._fresh:
            await self._list_after(self._now())
        return self._members.get(gateway)

    def home(self, session: str, created_at: float, gone: Container[str]) -> Member | None:
        """The gateway, but for those `gone`, that takes the session's samples; None if none is known.

        All that have the same list say the same. A newcomer takes none of a session that was there before it.
        """
        members = [member for member in self._members.values() if member.gateway not in gone]
        settled = [member for member in members if member.since_us / 1e6 + SETTLED_S <= created_at]
        if settled:
            return max(settled, key=lambda member: hashlib.sha256(f"{session} {member.gateway}".encode()).digest())
        return min(members, key=lambda member: (member.since_us, member.gateway), default=None)

    async def remove(self, member: Member) -> None:
        """Nobody is there. Raises StoreError."""
        self._members.pop(member.gateway, None)
        await self._store.delete(member.name)

    @property
    def _fresh(self) -> bool:
        return self._now() - self._listed_at < LISTED_S

    async def _forget_own(self) -> None:
        name, self._own = self._own, ""
        self._members.pop(self.gateway, None)
        await self._store.delete(name)

    async def _list_after(self, at: float) -> None:
        """As it is at this time, or later."""
        async with self._lock:
            if self._listed_at <= at:
                await self._list()

    async def _list(self) -> None:
        at = self._now()
        members: dict[str, Member] = {}
        for member in damage.parsed(await self._store.list(ObjectKind.GATEWAY.under()), _parse):
            members.setdefault(member.gateway, member)  # the oldest of a gateway is first
        self._members, self._listed_at = members, at


def _parse(key: str) -> Member:
    """Raises ValueError for a malformed name."""
    gateway, at_us, address = ObjectKind.GATEWAY.parse(key)
    return Member(gateway, int(at_us), bytes.fromhex(address).decode(), key)
