"""The exchange in a bucket, the store's or another. Generations are the bucket's."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar

from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, PreconditionFailed, Unauthorized
from google.auth.credentials import Signing
from google.auth.exceptions import GoogleAuthError

from knapper import limits
from knapper.errors import InvalidField, StoreError, TooLarge
from knapper.errors import NotFound as NotThere
from knapper.exchange import SEND_AGAIN, Blob, Entries, ListedObject, Signed
from knapper.store import check_name
from knapper.store.gcs import connect

_TIMEOUT_S = (5.0, 60.0)  # to connect, and between bytes
_FAILURES = (GoogleAPIError, GoogleAuthError, OSError)
_CHUNK_BYTES = 4 * limits.MIB  # of a read; each chunk is a request
_SHA256 = "knapper-sha256"  # metadata of objects that the server published
T = TypeVar("T")


class OpenedObject:
    """One generation of an object, which can be read until another replaces it."""

    def __init__(self, exchange: "GcsExchange", entry: ListedObject) -> None:
        self.entry = entry
        self._exchange = exchange

    async def read(self, begin: int, end: int) -> AsyncIterator[bytes]:
        for at in range(begin, end, _CHUNK_BYTES):
            yield await self._exchange.read_chunk(self.entry, at, min(at + _CHUNK_BYTES, end))

    def close(self) -> None:
        """Nothing to close: each chunk is a request."""


class GcsExchange:
    """Objects below `prefix` in the bucket, which exists already. Nothing is connected before the first verb."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._bucket_name, self._prefix = bucket, prefix
        self._connecting = threading.Lock()
        self._connected: Any = None  # google.cloud.storage.Bucket; only the store's module may import it

    async def disconnect(self) -> None:
        """Close the connections. The next verb connects again."""
        with self._connecting:
            connected, self._connected = self._connected, None
        if connected is not None:
            connected.client.close()

    @property
    def bucket(self) -> str:
        return self._bucket_name

    @property
    def prefix(self) -> str:
        return self._prefix

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        return await self._try(f"read {name}", self._read, check_name(name), bytes_max)

    async def open(self, name: str) -> OpenedObject | None:
        entry = await self._try(f"read {name}", self._entry_of, check_name(name))
        return None if entry is None else OpenedObject(self, entry)

    async def read_chunk(self, entry: ListedObject, begin: int, end: int) -> bytes:
        """Bytes of this generation. Raises StoreError once it is gone."""
        return await self._try(f"read {entry.name}", self._read_chunk, entry, begin, end)

    async def list(self, prefix: str) -> Entries:
        return await self._try(f"list {prefix!r}", self._list, prefix)

    async def publish(self, name: str, data: bytes) -> None:
        await self._try(f"write {name}", self._publish, check_name(name), data)

    async def extend(self, name: str, data: bytes) -> None:
        await self.publish(name, data)  # objects are immutable: a reader gets all of the old or the new one

    async def compose(self, name: str, parts: Sequence[str], sha256: str) -> None:
        await self._try(f"write {name}", self._compose, check_name(name), [check_name(part) for part in parts], sha256)

    async def presign(self, method: Literal["GET", "PUT"], name: str, bytes_max: int) -> Signed | None:
        return await self._try(f"sign a URL of {name}", self._presign, method, check_name(name), bytes_max)

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
            blob = self._bucket().get_blob(self._prefix + name, timeout=_TIMEOUT_S)
            if blob is None:
                return None
            if blob.size > bytes_max:
                raise TooLarge(f"{name} has {blob.size} bytes; allowed: {bytes_max}; split it, or leave some out of it")
            try:
                data: bytes = blob.download_as_bytes(if_generation_match=blob.generation, timeout=_TIMEOUT_S)
            except (NotFound, PreconditionFailed):
                continue  # replaced meanwhile
            return Blob(data, str(blob.generation))

    def _list(self, prefix: str) -> Entries:
        fields = "items(name,generation,size,metadata,updated),nextPageToken"
        blobs = self._bucket().list_blobs(prefix=self._prefix + prefix, fields=fields, timeout=_TIMEOUT_S)
        return [self._entry(blob) for blob in blobs]

    def _entry_of(self, name: str) -> ListedObject | None:
        blob = self._bucket().get_blob(self._prefix + name, timeout=_TIMEOUT_S)
        return None if blob is None else self._entry(blob)

    def _entry(self, blob: Any) -> ListedObject:
        return ListedObject(
            blob.name[len(self._prefix) :], str(blob.generation), int(blob.size),
            sha256=(blob.metadata or {}).get(_SHA256, ""), modified_at=blob.updated.timestamp(),
        )  # fmt: skip

    def _read_chunk(self, entry: ListedObject, begin: int, end: int) -> bytes:
        blob = self._bucket().blob(self._prefix + entry.name, generation=int(entry.generation))
        try:
            data: bytes = blob.download_as_bytes(start=begin, end=end - 1, timeout=_TIMEOUT_S)
        except NotFound as error:
            raise StoreError(f"{entry.name} was replaced or removed while it was read; ask for it again") from error
        return data

    def _publish(self, name: str, data: bytes) -> None:
        blob = self._bucket().blob(self._prefix + name)
        blob.metadata = {_SHA256: hashlib.sha256(data).hexdigest()}
        blob.upload_from_string(data, _content_type(name), timeout=_TIMEOUT_S)

    def _compose(self, name: str, parts: Sequence[str], sha256: str) -> None:
        digest, generations = hashlib.sha256(), []
        for part in parts:
            entry = self._entry_of(part)
            if entry is None:
                raise NotThere(f"{part} is not there")
            for data in self._chunks(entry):
                digest.update(data)
            generations.append(int(entry.generation))
        if digest.hexdigest() != sha256:
            raise InvalidField("sha256", sha256, f"that of the bytes that came, {digest.hexdigest()}", SEND_AGAIN)
        whole = self._bucket().blob(self._prefix + name)
        whole.content_type, whole.metadata = _content_type(name), {_SHA256: sha256}
        sources = [self._bucket().blob(self._prefix + part) for part in parts]
        try:
            whole.compose(sources, if_source_generation_match=generations, timeout=_TIMEOUT_S)
        except (NotFound, PreconditionFailed) as error:
            raise NotThere(f"parts of {name} were sent again meanwhile; ask for it again") from error

    def _chunks(self, entry: ListedObject) -> Iterator[bytes]:
        for at in range(0, entry.size, _CHUNK_BYTES):
            yield self._read_chunk(entry, at, min(at + _CHUNK_BYTES, entry.size))

    def _presign(self, method: str, name: str, bytes_max: int) -> Signed | None:
        bucket = self._bucket()
        if not isinstance(bucket.client._credentials, Signing):
            return None
        headers = {"x-goog-content-length-range": f"0,{bytes_max}"} if method == "PUT" else {}
        url: str = bucket.blob(self._prefix + name).generate_signed_url(
            version="v4", expiration=timedelta(seconds=limits.link_s), method=method, headers=dict(headers)
        )
        return Signed(url, headers)

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
    """The content type by suffix, for users who open the bucket in a browser."""
    kinds = {"json": "application/json", "jsonl": "application/x-ndjson", "yaml": "text/yaml", "md": "text/markdown"}
    return kinds.get(name.rpartition(".")[2], "application/octet-stream")
