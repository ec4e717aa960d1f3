"""The store in a bucket of Google Cloud Storage. The one module that imports its client.

Every object is created on the condition that its name is free, and never changed. A repeated upload, or one whose
response was lost, may have succeeded unnoticed: so each writer marks its objects, and reads the mark when in doubt.

Large objects are uploaded as parts under names of their own, in parallel; the object itself is then a small pointer to
them. So one small conditional upload always decides which writer gets a name.
"""

import asyncio
import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeVar

import msgspec
import requests
from google.api_core.exceptions import Forbidden, GoogleAPIError, NotFound, PreconditionFailed, Unauthorized
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage  # noqa: TID251 - here, and nowhere else
from google.cloud.storage import retry  # noqa: TID251 - the same
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse  # noqa: TID251 - the same
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError

from knapper import limits
from knapper.errors import Corrupt, StoreError
from knapper.store import Names, check_name

part_bytes_max = 8 * limits.MIB  # of one upload; the client would send more as a resumable one
_PARTS = ".parts/"  # the prefix of parts; no other object has it
_POINTER = b"knapper parts 1\n"  # the beginning of a pointer; other content that begins so is uploaded as parts too
_WRITER, _ID, _COUNT, _OF = "knapper-writer", "knapper-parts", "knapper-count", "knapper-of"  # metadata of objects
_AT_ONCE, _PARTS_AT_ONCE = 32, 8  # requests; parts have their own threads, so that no commit waits for a snapshot
_TIMEOUT_S = (5.0, 30.0)  # to connect, and between bytes
_FAILURES = (
    GoogleAPIError, GoogleAuthError, InvalidResponse, DataCorruption, requests.RequestException, HTTPError, OSError,
)  # fmt: skip
T = TypeVar("T")


class _Pointer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of a large object's name: the id, number, total size and hash of its parts."""

    id: str
    count: int
    size: int
    sha256: bytes


def connect() -> storage.Client:
    """A client with this machine's credentials, or anonymous for the emulator at STORAGE_EMULATOR_HOST."""
    client = storage.Client(project=None)  # not needed for buckets, and credentials may not name one
    # For its traces the client would read the bucket's metadata in the background, again after each missing object:
    # there are many, and it takes a permission that nothing else here needs.
    client._bucket_metadata_cache = None
    # By default the session keeps ten connections, and opens and closes all others for each request.
    adapter = HTTPAdapter(pool_connections=2, pool_maxsize=_AT_ONCE + _PARTS_AT_ONCE)
    client._http.mount("https://", adapter)
    client._http.mount("http://", adapter)
    return client


class GcsStore:
    """Object `a/b` is `<prefix>a/b` in the bucket, which exists already. `new_id`: 128 random bits in hexadecimal.

    Nothing is connected before the first verb.
    """

    def __init__(
        self, bucket: str, prefix: str, new_id: Callable[[], str], patience_s: float = limits.store_retry_s
    ) -> None:
        self._bucket_name, self._prefix = bucket, prefix
        self._new_id = new_id
        # Uploads have a condition; reads and deletes can be repeated without one.
        self._again = retry.DEFAULT_RETRY.with_delay(0.2, 4.0, 2.0).with_timeout(patience_s)
        self._again_if_conditional = retry.ConditionalRetryPolicy(
            self._again, retry.is_generation_specified, ["query_params"]
        )
        self._connecting = threading.Lock()
        self._connected: storage.Bucket | None = None
        self._seen = False  # whether the bucket is known to exist
        self._threads = ThreadPoolExecutor(_AT_ONCE, "gcs")
        self._part_threads = ThreadPoolExecutor(_PARTS_AT_ONCE, "gcs-part")

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        return await self._run(self._put, self._checked(name), bytes(data))

    async def get(self, name: str) -> bytes | None:
        return await self._run(self._get, self._checked(name))

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        return await self._run(self._list, prefix, start_after, limit)

    async def delete(self, name: str) -> None:
        await self._run(self._delete, self._checked(name))

    async def forget_torn_writes(self, now: float) -> int:
        """Delete unreferenced parts older than seven days, whose writers died. Return how many."""
        return await self._run(self._forget_torn_writes, now)

    async def _run(self, verb: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, verb, *arguments)

    @staticmethod
    def _checked(name: str) -> str:
        if check_name(name).startswith(_PARTS):
            raise ValueError(f"bad object name {name!r}: {_PARTS} is the store's own")
        return name

    async def disconnect(self) -> None:
        """Close the connections. The next verb connects again."""
        with self._connecting:
            connected, self._connected = self._connected, None
        if connected is not None:
            connected.client.close()

    def close(self) -> None:
        """Close threads and connections, which otherwise end with the process."""
        self._threads.shutdown()
        self._part_threads.shutdown()
        if self._connected is not None:
            self._connected.client.close()

    # -- in threads ----------------------------------------------------------------------------------------------------

    def _put(self, name: str, data: bytes) -> bool:
        if len(data) <= part_bytes_max and not data.startswith(_POINTER):
            return self._create(name, data, {})
        pointer = _Pointer(self._new_id(), -(-len(data) // part_bytes_max), len(data), hashlib.sha256(data).digest())
        view = memoryview(data)
        chunks = [bytes(view[at : at + part_bytes_max]) for at in range(0, len(data), part_bytes_max)]
        parts = zip(_names(pointer.id, pointer.count), chunks, strict=True)
        list(self._part_threads.map(lambda part: self._create(part[0], part[1], {_OF: name}), parts))
        metadata = {_ID: pointer.id, _COUNT: str(pointer.count)}
        created = self._create(name, _POINTER + msgspec.msgpack.encode(pointer), metadata)
        if not created:
            self._delete_parts(pointer.id, pointer.count)
        return created

    def _create(self, name: str, data: bytes, metadata: dict[str, str]) -> bool:
        """One conditional upload. True if the object is this call's, even if its response was lost."""
        mark = self._new_id()
        try:
            blob = self._blob(name)
            blob.metadata = {_WRITER: mark, **metadata}
            blob.upload_from_string(
                data, "application/octet-stream", if_generation_match=0, checksum="crc32c", timeout=_TIMEOUT_S,
                retry=self._again_if_conditional,
            )  # fmt: skip
            self._seen = True
            return True
        except PreconditionFailed:  # another writer's object, or this one's, whose response was lost before a retry
            return self._writer(name) == mark
        except (NotFound, Forbidden, Unauthorized) as error:
            self._explain(error, f"write {name}")
        except _FAILURES as error:
            if (winner := self._writer(name)) is not None:
                return winner == mark
            self._explain(error, f"write {name}")

    def _writer(self, name: str) -> str | None:
        """The mark of the object's writer, empty if it has none; None if there is no object."""
        try:
            blob = self._bucket().get_blob(self._prefix + name, timeout=_TIMEOUT_S, retry=self._again)
        except _FAILURES as error:
            self._explain(error, f"find out who wrote {name}")
        return None if blob is None else (blob.metadata or {}).get(_WRITER, "")

    def _get(self, name: str) -> bytes | None:
        while True:
            data = self._download(name)
            if data is None or not data.startswith(_POINTER):
                return data
            try:
                pointer = msgspec.msgpack.decode(data[len(_POINTER) :], type=_Pointer)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise Corrupt(f"object {name} is a damaged pointer to parts: {error}") from error
            parts = [*self._part_threads.map(self._download, _names(pointer.id, pointer.count))]
            if None in parts:
                if self._download(name) != data:
                    continue  # deleted while it was read
                raise Corrupt(f"object {name} lacks {parts.count(None)} of its {pointer.count} parts")
            whole = b"".join(part for part in parts if part is not None)
            if len(whole) != pointer.size or hashlib.sha256(whole).digest() != pointer.sha256:
                raise Corrupt(f"object {name} is {len(whole)} bytes that are not those which were written")
            return whole

    def _download(self, name: str) -> bytes | None:
        try:
            data: bytes = self._blob(name).download_as_bytes(checksum="auto", timeout=_TIMEOUT_S, retry=self._again)
        except NotFound:
            self._expect_bucket()
            return None
        except _FAILURES as error:
            self._explain(error, f"read {name}")
        self._seen = True
        return data

    def _list(self, prefix: str, start_after: str, limit: int) -> Names:
        names: Names = []
        prefix_length = len(self._prefix)
        try:
            for blob in self._bucket().list_blobs(
                prefix=self._prefix + prefix,
                start_offset=self._prefix + start_after if start_after else None,
                page_size=min(limit + 1, 1000) if limit else None,
                fields="items(name),nextPageToken",
                timeout=_TIMEOUT_S,
                retry=self._again,
            ):
                name = blob.name[prefix_length:]
                if name > start_after and not name.startswith(_PARTS):
                    names.append(name)
                    if len(names) == limit:
                        break
        except _FAILURES as error:
            self._explain(error, f"list {prefix!r}")
        self._seen = True
        return names

    def _delete(self, name: str) -> None:
        try:
            blob = self._bucket().get_blob(self._prefix + name, timeout=_TIMEOUT_S, retry=self._again)
            if blob is None:
                self._expect_bucket()
                return
            self._delete_blob(name)
        except _FAILURES as error:
            self._explain(error, f"delete {name}")
        if _ID in (metadata := blob.metadata or {}):
            self._delete_parts(metadata[_ID], int(metadata[_COUNT]))

    def _delete_parts(self, pointer_id: str, count: int) -> None:
        try:
            list(self._part_threads.map(self._delete_blob, _names(pointer_id, count)))
        except _FAILURES as error:
            self._explain(error, f"delete the parts {pointer_id}")

    def _delete_blob(self, name: str) -> None:
        """Delete an object. Safe to repeat without a condition: a deleted name is never used again."""
        try:
            self._blob(name).delete(timeout=_TIMEOUT_S, retry=self._again)
        except NotFound:
            pass

    def _forget_torn_writes(self, now: float) -> int:
        torn: dict[tuple[str, str], Names] = {}  # (object, pointer id) -> parts
        try:
            for blob in self._bucket().list_blobs(
                prefix=self._prefix + _PARTS, fields="items(name,metadata,timeCreated),nextPageToken",
                timeout=_TIMEOUT_S, retry=self._again,
            ):  # fmt: skip
                name = blob.name.removeprefix(self._prefix)
                if now - blob.time_created.timestamp() > limits.torn_after_s:
                    torn.setdefault(((blob.metadata or {}).get(_OF, ""), name.split("/")[1]), []).append(name)
            for owner, pointer_id in torn:
                blob = self._bucket().get_blob(self._prefix + owner, timeout=_TIMEOUT_S, retry=self._again)
                if blob is not None and (blob.metadata or {}).get(_ID) == pointer_id:
                    torn[owner, pointer_id] = []
                list(self._part_threads.map(self._delete_blob, torn[owner, pointer_id]))
        except _FAILURES as error:
            self._explain(error, f"sweep {_PARTS}")
        return sum(map(len, torn.values()))

    def _blob(self, name: str) -> storage.Blob:
        return self._bucket().blob(self._prefix + name)

    def _bucket(self) -> storage.Bucket:
        with self._connecting:
            if self._connected is None:
                self._connected = connect().bucket(self._bucket_name)
            return self._connected

    def _expect_bucket(self) -> None:
        """Raises StoreError for a missing bucket, which is otherwise like a missing object."""
        if not self._seen:
            self._list("", "", 1)

    def _explain(self, error: Exception, doing: str) -> NoReturn:
        reason = str(error) or type(error).__name__
        if isinstance(error, NotFound):
            reason = "the bucket does not exist; create it, or correct KNAPPER_STORE"
        elif isinstance(error, Forbidden | Unauthorized):
            reason = f"permission denied; the service account needs roles/storage.objectUser on the bucket ({reason})"
        elif isinstance(error, GoogleAuthError):
            reason = f"no valid credentials ({reason})"
        raise StoreError(f"cannot {doing} in gs://{self._bucket_name}: {reason[:500]}", retry_after_s=5.0) from error


def _names(pointer_id: str, count: int) -> Names:
    return [f"{_PARTS}{pointer_id}/{number:06d}" for number in range(count)]
