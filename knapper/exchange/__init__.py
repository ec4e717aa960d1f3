"""The exchange: users write `inbox/<tenant>/<job>/...`, and read `jobs/<tenant>/<job>/...`.

`uploads/<tenant>/...` collects the parts of a file until it is complete; nothing in it starts a job.

The exchange holds no state: a job copies its input from the inbox when it starts, and its output is derived from the
store and can be published again.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Blob:
    """An object's bytes and generation, which tells it from others of the same name."""

    data: bytes
    generation: str


@dataclass(frozen=True)
class ListedObject:
    """An object of a list. `sha256`: empty if only reading would tell it. `modified_at`: seconds since the epoch."""

    name: str
    generation: str
    size: int
    sha256: str = ""
    modified_at: float = 0.0


SEND_AGAIN = "Send the file's parts again"
Entries = list[ListedObject]  # inside a class with a verb `list`, the word means the verb


class Opened(Protocol):
    """One open object, even if another takes its name. Read it once, or close it."""

    @property
    def entry(self) -> ListedObject: ...

    def read(self, begin: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `begin` to before `end`, in chunks; then it is closed. Raises StoreError if they are gone."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Signed:
    """A presigned request, which needs no key. `headers`: those that it must have."""

    url: str
    headers: Mapping[str, str]


class Exchange(Protocol):
    """Names are those of a store. Every verb may raise StoreError."""

    @property
    def bucket(self) -> str:
        """The bucket's name in storage events."""

    @property
    def prefix(self) -> str:
        """The prefix of all names in the bucket, with its slash."""

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        """The object, or None. Raises TooLarge above `bytes_max`, before the bytes are fetched."""

    async def open(self, name: str) -> Opened | None:
        """The object, to be read in chunks, or None."""

    async def list(self, prefix: str) -> Entries:
        """Objects whose names begin with `prefix`, in order."""

    async def publish(self, name: str, data: bytes) -> None:
        """Write the object atomically, replacing any of the same name."""

    async def extend(self, name: str, data: bytes) -> None:
        """`publish` of a growing object of whole lines; a directory appends only the new ones.

        A reader that follows the file gets each line once, even after a crash. An object that is not the beginning of
        `data` is replaced.
        """

    async def compose(self, name: str, parts: Sequence[str], sha256: str) -> None:
        """Write the concatenation of the objects `parts` (1 to 32) under the name, replacing any object there.

        Raises InvalidField if its SHA-256 is another, NotFound if a part is missing; then nothing is changed.
        """

    async def presign(self, method: Literal["GET", "PUT"], name: str, bytes_max: int) -> Signed | None:
        """A request that works without a key for an hour, a PUT up to `bytes_max`; None if it cannot be signed."""

    async def remove(self, name: str) -> None:
        """A missing object is no error."""
