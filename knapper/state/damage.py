"""Damaged objects: where many are read, each is reported to the operator and left out, and hides no other.

A read of one object by its name raises the error instead.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Final, TypeVar

import structlog

from knapper.errors import Corrupt, KnapperError, NewerFormat, damaged
from knapper.observability import metrics
from knapper.store import many

ERRORS: Final = (Corrupt, NewerFormat)  # only an operator can resolve them, one object at a time
_REPORTED_MAX = 10_000
_reported: set[str] = set()  # of the process: each object is reported once

log = structlog.get_logger()
K = TypeVar("K")
V = TypeVar("V")


def report(error: KnapperError) -> None:
    """Log the object and count it, once. `knapper verify` finds all of them."""
    reason = str(error)
    if reason in _reported:
        return
    if len(_reported) >= _REPORTED_MAX:
        _reported.clear()
    _reported.add(reason)
    metrics.unreadable_objects.inc()
    log.error("an object cannot be read, and is left out", code=error.code, reason=reason)


async def readable(keys: Iterable[K], read: Callable[[K], Awaitable[V]]) -> list[V]:
    """The result of `read` for each key, in the order of the keys, without damaged objects."""

    async def read_one(key: K) -> tuple[V, ...]:
        try:
            return (await read(key),)
        except ERRORS as error:
            report(error)
            return ()

    return [value for values in await many.each(keys, read_one) for value in values]


async def unless(reading: Awaitable[V], otherwise: V) -> V:
    """The result of the read, or `otherwise` if the object is damaged."""
    try:
        return await reading
    except ERRORS as error:
        report(error)
        return otherwise


def parsed(names: Iterable[str], parse: Callable[[str], V]) -> list[V]:
    """The result of `parse` for each name; names of no known form, for which it raises ValueError, are left out."""
    values = []
    for name in names:
        try:
            values.append(parse(name))
        except ValueError:
            report(damaged(name, "no kind of object has such a name"))
    return values
