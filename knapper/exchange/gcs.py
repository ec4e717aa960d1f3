"""The exchange in a bucket: beside the store's or in another. A generation is the bucket's own."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, PreconditionFailed, Unauthorized
from google.auth.exceptions import GoogleAuthError

from knapper.errors import StoreError, TooLarge
from knapper.exchange import Blob, Entries, Entry
from knapper.store import check_name
from knapper.store.gcs import connect

_TIMEOUT_S = (5.0, 60.0)  # to connect, and between bytes
_FAILURES = (GoogleAPIError, GoogleAuthError, OSError)
T = TypeVar("T")


class GcsExchange:
    """Objects below `prefix` in the bucket, which exists already. Nothing is connected before the first verb."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket_name, self._prefix = bucket, prefix
        self._connecting = threading.Lock()
        self._connected: Any = None  # google.cloud.storage.Bucket, which only the store's module may import

    @property
    def bucket(self) -> str:
        return self._bucket_name

    @property
    def prefix(self) -> str:
        return self._prefix

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        return await self._try(f"read {name}", self._read, check_name(name), bytes_max)

    async def list(self, prefix: str) -> Entries:
        return await self._try(f"list {prefix!r}", self._list, prefix)

    async def publish(self, name: str, data: bytes) -> None:
        await self._try(f"write {name}", self._publish, check_name(name), data)

    async def extend(self, name: str, data: bytes) -> None:
        await self.publish(name, data)  # objects are immutable: whoever reads one gets it whole, old or new

    async def remove(self, name: str) -> None:
        await self._try(f"remove {name}", self._remove, check_name(name))

    async def _try(self, doing: str, verb: Callable[..., T], *arguments: object) -> T:
        try:
            return await asyncio.to_thread(verb, *arguments)
        except _FAILURES as error:
            self._explain(error, doing)

    # -- in threads ----------------------------------------------------------------------------------------------------

    def _read(self, name: str, bytes_max: int) -> Blob | None:
        while True:
            found = self._bucket().get_blob(self._prefix + name, timeout=_TIMEOUT_S)
            if found is None:
                return None
            if found.size > bytes_max:
                raise TooLarge(
                    f"{name} has {found.size} bytes; allowed: {bytes_max}; split it, or leave some out of it"
                )
            try:
                data: bytes = found.download_as_bytes(if_generation_match=found.generation, timeout=_TIMEOUT_S)
            except (NotFound, PreconditionFailed):
                continue  # another came in its place meanwhile
            return Blob(data, str(found.generation))

    def _list(self, prefix: str) -> Entries:
        found = self._bucket().list_blobs(
            prefix=self._prefix + prefix, fields="items(name,generation,size),nextPageToken", timeout=_TIMEOUT_S
        )
        own = len(self._prefix)
        return [Entry(blob.name[own:], str(blob.generation), int(blob.size)) for blob in found]

    def _publish(self, name: str, data: bytes) -> None:
        self._bucket().blob(self._prefix + name).upload_from_string(data, _content_type(name), timeout=_TIMEOUT_S)

    def _remove(self, name: str) -> None:
        try:
            self._bucket().blob(self._prefix + name).delete(timeout=_TIMEOUT_S)
        except NotFound:
            pass

    def _bucket(self) -> Any:
        with self._connecting:
            if self._connected is None:
                self._connected = connect().bucket(self._bucket_name)
            return self._connected

    def _explain(self, error: Exception, doing: str) -> NoReturn:
        reason = str(error) or type(error).__name__
        if isinstance(error, NotFound):
            reason = "the bucket does not exist; create it, or correct KNAPPER_EXCHANGE"
        elif isinstance(error, Forbidden | Unauthorized):
            reason = f"permission denied; the service account needs roles/storage.objectUser on the bucket ({reason})"
        elif isinstance(error, GoogleAuthError):
            reason = f"no valid credentials ({reason})"
        raise StoreError(f"cannot {doing} in gs://{self._bucket_name}: {reason[:500]}", retry_after_s=5.0) from error


def _content_type(name: str) -> str:
    """For browsers that look into the bucket."""
    kinds = {"json": "application/json", "jsonl": "application/x-ndjson", "yaml": "text/yaml", "md": "text/markdown"}
    return kinds.get(name.rpartition(".")[2], "application/octet-stream")
