"""The exchange: people put `inbox/<tenant>/<job>/...` in, and take `jobs/<tenant>/<job>/...` out.

It holds no state: what a job needs is copied from the inbox when it starts, and what it publishes is derived from the
store and can be published again.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Blob:
    """An object's bytes, and which of the objects that had its name it is."""

    data: bytes
    generation: str


@dataclass(frozen=True)
class Entry:
    """An object of a list."""

    name: str
    generation: str
    size: int


Entries = list[Entry]  # inside a class with a verb `list`, the word means the verb


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

    async def list(self, prefix: str) -> Entries:
        """Objects whose names begin with `prefix`, in order."""

    async def publish(self, name: str, data: bytes) -> None:
        """Put the object in the place of whatever has its name; nobody sees half of it."""

    async def extend(self, name: str, data: bytes) -> None:
        """`publish`, of whole lines, for an object that grows: where files can, only what is new is appended.

        Whoever follows the file reads each line once, whatever was killed on the way. What lies there and does not
        begin `data` is replaced.
        """

    async def remove(self, name: str) -> None:
        """A missing object is no error."""
