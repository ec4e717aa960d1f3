"""Marks: the sessions in which something is left to collect, now or later.

collect/now/<session>/<what>                empty; `what` is another for each thing that happens
collect/later/<microseconds>/<session>      nothing can go before this time, unless something happens

A mark is put before what it tells of. The collector takes away those that it has seen, once it has put one for later,
or nothing is left for it to do. So it never has to look through all that is finished, nor list it; and whatever is not
finished is never overlooked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from knapper.ids import SessionId, number
from knapper.store import Names, Store, many

_NOW, _LATER = "collect/now/", "collect/later/"
_BEGUN = "collect/begun"  # is there once every session that was made before there were marks has one
_PAGE = 999  # names of one listing, as a bucket serves them in one request


@dataclass(frozen=True)
class Due:
    """Of what was put off: each session whose time has come, with its marks; and when the next one's comes."""

    sessions: dict[SessionId, Names]
    next_at: float


async def put(store: Store, session: SessionId, what: str) -> None:
    """Durable on return. A repetition changes nothing."""
    await store.put_if_absent(f"{_NOW}{session}/{what}", b"")


async def put_off(store: Store, session: SessionId, until: float) -> None:
    """`until`: in seconds since the epoch. Those of now are taken away after it."""
    await store.put_if_absent(f"{_LATER}{number(int(until * 1e6))}/{session}", b"")


async def listed(store: Store) -> dict[SessionId, Names]:
    """The sessions that are marked now, each with its marks."""
    found: dict[SessionId, Names] = {}
    for name in await store.list(_NOW):
        found.setdefault(SessionId(name.split("/")[2]), []).append(name)
    return found


async def due(store: Store, now: float) -> Due:
    """Lists no more than what is due, and a page."""
    found: dict[SessionId, Names] = {}
    after = ""
    while page := await store.list(_LATER, start_after=after, limit=_PAGE):
        for name in page:
            _, _, at, session = name.split("/")
            if int(at) > now * 1e6:
                return Due(found, int(at) / 1e6)
            found.setdefault(SessionId(session), []).append(name)
        after = page[-1]
    return Due(found, inf)


async def remove(store: Store, seen: Iterable[str]) -> None:
    await many.each(seen, store.delete)


async def mark_all(store: Store) -> None:
    """Mark every session that there is, once in the life of a store: those of an older knapper have none."""
    if await store.get(_BEGUN) is not None:
        return
    for session in sorted({name.split("/")[1] for name in await store.list("sessions/")}):
        await put(store, SessionId(session), "found")
    await store.put_if_absent(_BEGUN, b"")
