"""Opens the exchange that the settings name."""

from importlib.util import find_spec

from knapper.concurrency import quiesce
from knapper.errors import InvalidField
from knapper.exchange import Exchange
from knapper.exchange.directory import DirectoryExchange
from knapper.settings import Settings, variable
from knapper.store.factory import bucket_of


def open_exchange(settings: Settings) -> Exchange:
    """The exchange of this deployment. Raises InvalidField for a bad address."""
    if not settings.exchange:
        return DirectoryExchange(settings.data)
    bucket, prefix = bucket_of("exchange", settings.exchange)
    from knapper.exchange.gcs import GcsExchange

    exchange = GcsExchange(bucket, prefix)
    quiesce.before(exchange.disconnect)
    return exchange


def expect_subscribable(settings: Settings) -> None:
    """Raises InvalidField for a subscription if the Pub/Sub library is not installed."""
    if settings.subscription and not _installed("google.cloud.pubsub_v1"):
        raise InvalidField(
            variable("subscription"), settings.subscription, "a subscription only with the extra gcp",
            "pip install 'knapper[gcp]'",
        )  # fmt: skip


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing too
        return False
