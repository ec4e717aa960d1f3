"""The broker: takes an event, answers at once, and delivers it to every trigger that wants it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import aiohttp
import structlog

from knapper import limits
from knapper.errors import TooMany
from knapper.local.broker.delivery import HOPS_MAX, Delivery, Letter
from knapper.local.broker.fault_injection import FaultInjection
from knapper.local.broker.triggers import TRIGGERS

log = structlog.get_logger()


class LocalBroker:
    """`url_of`: where a subscriber listens for an event with these attributes; empty for nowhere.

    `faults`: applied to deliveries, None for none.
    """

    def __init__(
        self,
        client: aiohttp.ClientSession,
        url_of: Callable[[str, Mapping[str, str]], Awaitable[str]],
        dead_url: str,
        faults: FaultInjection | None = None,
    ) -> None:
        self._url_of = url_of
        self._delivery = Delivery(client, self._take, dead_url)
        self._faults = faults
        self._under_way: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        """Deliveries that are not done."""
        return len(self._under_way)

    async def post(self, letter: Letter) -> None:
        """An event from outside: a fresh count of hops. Raises TooMany when too much is under way."""
        await self._take(letter.with_hops(HOPS_MAX))

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _take(self, letter: Letter) -> None:
        attributes = letter.attributes
        for trigger in TRIGGERS:
            if not trigger.wants(attributes) or not (url := await self._url_of(trigger.subscriber, attributes)):
                continue
            for late_s in self._faults.copies() if self._faults else [0.0]:
                if self.under_way >= limits.events_in_flight_max:
                    raise TooMany(f"{self.under_way} events are under way; allowed: {limits.events_in_flight_max}")
                task = asyncio.create_task(self._deliver(letter, url, late_s))
                self._under_way.add(task)
                task.add_done_callback(self._ended)

    async def _deliver(self, letter: Letter, url: str, late_s: float) -> None:
        if late_s:
            await asyncio.sleep(late_s)
        await self._delivery.deliver(letter, url)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and (defect := task.exception()) is not None:
            log.error("broker: defect", exc_info=defect)
