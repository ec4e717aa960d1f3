"""Opens the store that the settings name."""

import re
from secrets import token_hex  # noqa: TID251 - marks of writers: unique, and never replayed

from knapper.concurrency import quiesce
from knapper.errors import InvalidField
from knapper.settings import Settings, variable
from knapper.store import Store
from knapper.store.directory import DirectoryStore

_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])((?:/[A-Za-z0-9][A-Za-z0-9._-]{0,63}){0,4})/?")
_ALLOWED = "empty (a directory below KNAPPER_DATA), or gs://BUCKET or gs://BUCKET/PREFIX"


def open_store(settings: Settings) -> Store:
    """The store of this deployment. Raises InvalidField for a bad address.

    A bucket is not accessed before the first verb; its client is imported only if one is named.
    """
    if not settings.store:
        return DirectoryStore(settings.store_directory)
    bucket, prefix = bucket_of("store", settings.store)
    from knapper.store.gcs import GcsStore

    store = GcsStore(bucket, prefix, lambda: token_hex(16))
    quiesce.before(store.disconnect)
    return store


def bucket_of(setting: str, address: str) -> tuple[str, str]:
    """(bucket, prefix with its slash) of `gs://BUCKET/PREFIX`. Raises InvalidField, also without its client."""
    match = _BUCKET.fullmatch(address)
    if match is None:
        raise InvalidField(variable(setting), address, _ALLOWED)
    try:
        import knapper.store.gcs  # noqa: F401  only to see whether its client is installed
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("google"):
            raise
        raise InvalidField(
            variable(setting), address, "a bucket only with the extra gcp", "pip install 'knapper[gcp]'"
        ) from error
    return match[1], match[2].removeprefix("/") + "/" if match[2] else ""
