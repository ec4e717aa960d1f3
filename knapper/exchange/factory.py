"""Which exchange the settings name, opened."""

from importlib.util import find_spec

from knapper.errors import InvalidField
from knapper.exchange import Exchange
from knapper.exchange.directory import DirectoryExchange
from knapper.settings import Settings, variable
from knapper.store.factory import bucket_of


def open_exchange(settings: Settings) -> Exchange:
    """The exchange of this deployment. Raises InvalidField for an address that is none."""
    if not settings.exchange:
        return DirectoryExchange(settings.data)
    bucket, prefix = bucket_of("exchange", settings.exchange)
    from knapper.exchange.gcs import GcsExchange

    return GcsExchange(bucket, prefix)


def expect_subscribable(settings: Settings) -> None:
    """Raises InvalidField for a subscription without the library that pulls from it."""
    if settings.subscription and not _installed("google.cloud.pubsub_v1"):
        raise InvalidField(
            variable("subscription"), settings.subscription, "a subscription only with the extra gcp",
            "pip install 'knapper[gcp]'",
        )  # fmt: skip


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False
