"""The services that every part of a job uses: the store, the exchange, the notifier and the clock."""

from collections.abc import Callable
from dataclasses import dataclass

from knapper.events.broker import Broker
from knapper.events.function_key import FunctionKey
from knapper.exchange import Exchange
from knapper.exchange.factory import open_exchange
from knapper.jobs.notifications import Notifier
from knapper.settings import Settings
from knapper.store import Store


@dataclass(frozen=True)
class JobServices:
    """`clock`: seconds since the epoch."""

    store: Store
    exchange: Exchange
    notifier: Notifier
    clock: Callable[[], float]


def open_job_services(settings: Settings, store: Store, clock: Callable[[], float]) -> JobServices:
    """The services of this process. Raises InvalidField for a malformed exchange address."""
    broker = Broker(settings.broker_url, FunctionKey(store))
    return JobServices(store, open_exchange(settings), Notifier(broker.post, clock), clock)
