"""Which store the settings name, opened."""

import re
from secrets import token_hex  # noqa: TID251 - marks of writers: never replayed, and unlike those of all other processes

from knapper.errors import InvalidField
from knapper.settings import Settings, variable
from knapper.store import Store
from knapper.store.directory import DirectoryStore

_BUCKET = re.compile(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])((?:/[A-Za-z0-9][A-Za-z0-9._-]{0,63}){0,4})/?")
_ALLOWED = "empty (the directory store below KNAPPER_DATA), or gs://BUCKET or gs://BUCKET/PREFIX"


def open_store(settings: Settings) -> Store:
    """The store of this deployment. Raises InvalidField for an address that is none.

    Of a bucket, nothing is looked at before the first verb; its client is only imported for one.
    """
    if not settings.store:
        return DirectoryStore(settings.store_directory)
    match = _BUCKET.fullmatch(settings.store)
    if match is None:
        raise InvalidField(variable("store"), settings.store, _ALLOWED)
    try:
        from knapper.store.gcs import GcsStore
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("google"):
            raise
        raise InvalidField(
            variable("store"), settings.store, "a bucket only with the extra gcp", "pip install 'knapper[gcp]'"
        ) from error
    return GcsStore(match[1], match[2].removeprefix("/") + "/" if match[2] else "", lambda: token_hex(16))
