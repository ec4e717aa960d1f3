"""Which exchange the settings name, opened."""

from knapper.exchange import Exchange
from knapper.exchange.directory import DirectoryExchange
from knapper.settings import Settings
from knapper.store.opening import bucket_of


def open_exchange(settings: Settings) -> Exchange:
    """The exchange of this deployment. Raises InvalidField for an address that is none."""
    if not settings.exchange:
        return DirectoryExchange(settings.data)
    bucket, prefix = bucket_of("exchange", settings.exchange)
    from knapper.exchange.gcs import GcsExchange

    return GcsExchange(bucket, prefix)
