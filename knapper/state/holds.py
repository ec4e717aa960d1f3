"""Holds: what each gateway has under way for a tenant and no record has yet, as names, for the other gateways to see.

A hold, <microseconds>-<samples>-<tokens>, is renewed while samples are under way, and deleted when none are. One that
was not renewed for a minute, since it was first seen here, is of a gateway that died: clocks may be apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from knapper.ids import Tenant, number
from knapper.state import damage
from knapper.state.layout import ObjectKind
from knapper.store import Store

RENEWED_S: Final = 10.0  # other gateways see samples this late
HELD_S: Final = 60.0


@dataclass(frozen=True)
class UnderWay:
    """What no record has yet. `gateways`: how many hold this together, this one included."""

    samples: int = 0
    tokens: int = 0
    gateways: int = 1


class Holds:
    """`gateway`: the random name of this process. `clock`: seconds since the epoch."""

    def __init__(self, store: Store, gateway: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._gateway = gateway
        self._clock = clock
        self._own: dict[Tenant, tuple[str, float]] = {}  # the newest name, and when it was written
        self._seen: dict[Tenant, dict[str, float]] = {}  # names of others, and when each was first seen

    def due(self) -> list[Tenant]:
        """The tenants whose hold is to be renewed, or deleted."""
        return [tenant for tenant, (_, at) in self._own.items() if abs(self._clock() - at) >= RENEWED_S]

    async def renew(self, tenant: Tenant, samples: int, tokens: int) -> None:
        """Show what this gateway has under way."""
        before, at = self._own.get(tenant), self._clock()
        name = ObjectKind.HOLD.key(tenant, self._gateway, f"{number(int(at * 1e6))}-{samples}-{tokens}")
        await self._store.put_if_absent(name, b"")
        self._own[tenant] = name, at
        if before is not None and before[0] != name:
            await self._store.delete(before[0])

    async def release(self, tenant: Tenant) -> None:
        """Nothing is under way here."""
        if (own := self._own.pop(tenant, None)) is not None:
            await self._store.delete(own[0])

    async def of_others(self, tenant: Tenant) -> UnderWay:
        """What the other gateways show, all together. Deletes holds of gateways that died."""
        newest: dict[str, tuple[int, int]] = {}
        now, seen, before = self._clock(), dict[str, float](), self._seen.pop(tenant, {})
        for name, gateway, samples, tokens in damage.parsed(
            await self._store.list(ObjectKind.HOLD.under(tenant)), _parse
        ):
            if gateway == self._gateway:
                continue
            if abs(now - before.get(name, now)) >= HELD_S:
                await self._store.delete(name)
            else:
                seen[name], newest[gateway] = before.get(name, now), (samples, tokens)  # in order of time
        if seen:
            self._seen[tenant] = seen
        samples, tokens = (sum(each[n] for each in newest.values()) for n in (0, 1))
        return UnderWay(samples, tokens, len(newest) + 1)


def _parse(name: str) -> tuple[str, str, int, int]:
    """(name, gateway, samples, tokens). Raises ValueError for a malformed name."""
    _, gateway, hold = ObjectKind.HOLD.parse(name)
    _, samples, tokens = map(int, hold.split("-"))
    return name, gateway, samples, tokens
