"""The services that every part of a job uses: the store, the exchange, the notifier and the clock."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from knapper.events.broker import Broker
from knapper.events.function_key import FunctionKey
from knapper.exchange import Exchange
from knapper.exchange.factory import open_exchange
from knapper.jobs.notifications import Notifier
from knapper.jobs.quota import JobQuota
from knapper.settings import Settings
from knapper.state.prices import Prices
from knapper.store import Store


@dataclass(frozen=True)
class JobServices:
    """`clock`: seconds since the epoch."""

    store: Store
    exchange: Exchange
    notifier: Notifier
    clock: Callable[[], float]
    prices: Prices = field(default_factory=Prices)

    @cached_property
    def quota(self) -> JobQuota:
        return JobQuota(self.store, self.clock)


def open_job_services(settings: Settings, store: Store, clock: Callable[[], float]) -> JobServices:
    """The services of this process. Raises InvalidField for a malformed exchange address."""
    broker = Broker(settings.broker_url, FunctionKey(store))
    notifier = Notifier(broker.post, clock)
    return JobServices(store, open_exchange(settings), notifier, clock, Prices.of(settings))
