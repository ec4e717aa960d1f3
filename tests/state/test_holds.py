"""Holds of other gateways count while they are renewed, whatever the clocks say."""

import asyncio

import pytest

from knapper.ids import Tenant
from knapper.state.holds import HELD_S, RENEWED_S, Holds, UnderWay
from knapper.store.memory import MemoryStore

ALICE = Tenant("alice")


@pytest.mark.parametrize("ahead", [-3600.0, 0.0, 3600.0])
def test_a_hold_counts_until_it_has_not_been_renewed_for_a_minute(ahead: float) -> None:
    async def story() -> None:
        store, now = MemoryStore(), [10_000.0]
        a, b = Holds(store, "a" * 32, lambda: now[0] + ahead), Holds(store, "b" * 32, lambda: now[0])
        for _ in range(2 * round(HELD_S / RENEWED_S)):
            await a.renew(ALICE, 3, 70)
            assert await b.of_others(ALICE) == UnderWay(3, 70, 2)
            now[0] += RENEWED_S
        now[0] += HELD_S  # it died
        assert await b.of_others(ALICE) == UnderWay()
        assert await store.list("held/") == []

    asyncio.run(story())
