"""The object store: the only state. Four verbs, and objects are never overwritten."""

from typing import Protocol, runtime_checkable

NAME_CHARS_MAX = 900
Names = list[str]  # inside a class with a verb `list`, the word means the verb


@runtime_checkable
class Store(Protocol):
    """The contract of every backend; `tests/store` holds all of them to it.

    Names are '/'-separated, non-empty segments without '.' or '..' as a whole segment. Every verb may raise
    StoreError; after a failed `put_if_absent` or `delete` it is unknown whether it happened. Reads see every earlier
    acknowledged write.
    """

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create the object and return True once it is durable; False if the name is taken, even by the same bytes."""

    async def get(self, name: str) -> bytes | None:
        """The whole object, or None."""

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        """At most `limit` (0: all) names with `prefix` that sort after `start_after`, in order of code points."""

    async def delete(self, name: str) -> None:
        """Remove the object; a missing one is no error."""


@runtime_checkable
class Leaving(Protocol):
    """A store in which a writer that dies may leave garbage."""

    async def forget_torn_writes(self, now: float) -> int: ...


async def forget_torn_writes(store: Store, now: float) -> int:
    """Delete the unreferenced garbage of writers that died a week ago. Return how many objects."""
    return await store.forget_torn_writes(now) if isinstance(store, Leaving) else 0


def check_name(name: str) -> str:
    """The name. Raises ValueError for a bad one, which is a defect of the caller: requests never name objects."""
    if (
        not name
        or len(name) > NAME_CHARS_MAX
        or any(part in ("", ".", "..") for part in name.split("/"))
        or "\0" in name
    ):
        raise ValueError(f"bad object name {name!r}")
    return name
