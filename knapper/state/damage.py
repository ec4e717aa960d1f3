"""Damaged objects where many are read: each is told to the operator and left out, and hides nothing else.

What is asked for by its name is not left out: whoever asks hears the error, and nobody else does.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import structlog

from knapper.errors import Corrupt, KnapperError, NewerFormat, damaged
from knapper.observability import metrics
from knapper.store import many

ERRORS: Final = (Corrupt, NewerFormat)  # what only an operator ends, one object at a time
_TOLD_MAX = 10_000
_told: set[str] = set()  # of the process: an object is told of once, however often it is met

log = structlog.get_logger()
K = TypeVar("K")
V = TypeVar("V")


def tell(error: KnapperError) -> None:
    """Log the object and count it, once. `knapper verify` finds all there are."""
    reason = str(error)
    if reason in _told:
        return
    if len(_told) >= _TOLD_MAX:
        _told.clear()
    _told.add(reason)
    metrics.unreadable_objects.inc()
    log.error("an object cannot be read, and is left out", code=error.code, reason=reason)


async def readable(keys: Iterable[K], read: Callable[[K], Awaitable[V]]) -> list[V]:
    """What `read` returns for each key, in the order of the keys, without those that are damaged."""

    async def one(key: K) -> tuple[V, ...]:
        try:
            return (await read(key),)
        except ERRORS as error:
            tell(error)
            return ()

    return [value for found in await many.each(keys, one) for value in found]


async def unless(reading: Awaitable[V], otherwise: V) -> V:
    """What it reads, or `otherwise` if that is damaged."""
    try:
        return await reading
    except ERRORS as error:
        tell(error)
        return otherwise


def parsed(names: Iterable[str], parse: Callable[[str], V]) -> list[V]:
    """What each name says, without names that are none of ours. `parse` raises ValueError for those."""
    found = []
    for name in names:
        try:
            found.append(parse(name))
        except ValueError:
            tell(damaged(name, "its name is none that is given there"))
    return found
