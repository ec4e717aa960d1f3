"""The exchange: people put `inbox/<tenant>/<job>/...` in, and take `jobs/<tenant>/<job>/...` out.

`uploads/<tenant>/...` is for files that come in parts, until all of them are there; nothing in it starts anything.

It holds no state: what a job needs is copied from the inbox when it starts, and what it publishes is derived from the
store and can be published again.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Blob:
    """An object's bytes, and which of the objects that had its name it is."""

    data: bytes
    generation: str


@dataclass(frozen=True)
class ListedObject:
    """An object of a list. `sha256`: empty where nobody knows it without reading. `modified_at`: s since the epoch."""

    name: str
    generation: str
    size: int
    sha256: str = ""
    modified_at: float = 0.0


SEND_AGAIN = "Send the file's parts again"
Entries = list[ListedObject]  # inside a class with a verb `list`, the word means the verb


class Opened(Protocol):
    """One object, whatever takes its name from now on. Whoever has it reads it once, or closes it."""

    @property
    def entry(self) -> ListedObject: ...

    def read(self, begin: int, end: int) -> AsyncIterator[bytes]:
        """Its bytes from `begin` to before `end`, a piece at a time; then it is closed. Raises StoreError if they are
        gone meanwhile."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Signed:
    """A request that needs no key. `headers`: what it has to have."""

    url: str
    headers: Mapping[str, str]


class Exchange(Protocol):
    """Names are those of a store. Every verb may raise StoreError."""

    @property
    def bucket(self) -> str:
        """What events of storage call it."""

    @property
    def prefix(self) -> str:
        """What stands before our names there, with its slash."""

    async def read(self, name: str, bytes_max: int) -> Blob | None:
        """The object, or None. Raises TooLarge for one of more than `bytes_max`, before its bytes are fetched."""

    async def open(self, name: str) -> Opened | None:
        """The object, to be read in pieces, or None."""

    async def list(self, prefix: str) -> Entries:
        """Objects whose names begin with `prefix`, in order."""

    async def publish(self, name: str, data: bytes) -> None:
        """Put the object in the place of whatever has its name; nobody sees half of it."""

    async def extend(self, name: str, data: bytes) -> None:
        """`publish`, of whole lines, for an object that grows: where files can, only what is new is appended.

        Whoever follows the file reads each line once, whatever was killed on the way. What lies there and does not
        begin `data` is replaced.
        """

    async def compose(self, name: str, parts: Sequence[str], sha256: str) -> None:
        """Put what the objects `parts` are one after another (1 to 32) in the place of whatever has the name.

        Raises InvalidField unless their SHA-256 is this; NotFound if one is missing. Then nothing is changed.
        """

    async def signed(self, method: Literal["GET", "PUT"], name: str, bytes_max: int) -> Signed | None:
        """A request by which anyone may do this for an hour, a PUT with at most `bytes_max`; None: nobody can sign."""

    async def remove(self, name: str) -> None:
        """A missing object is no error."""
