"""Marks: the sessions in which something is left to collect, now or later.

A mark for now says what happened, another for each thing; one for later, that nothing can go before its time, unless
something happens.

A mark is put before what it tells of. The collector takes away those that it has seen, once it has put one for later,
or nothing is left for it to do. So it never has to look through all that is finished, nor list it; and whatever is not
finished is never overlooked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from knapper.ids import SessionId
from knapper.state import layout
from knapper.state.layout import ObjectKind
from knapper.store import Names, Store, many

_BEGUN = ObjectKind.COLLECT_BEGUN.key()  # is there once every session that was made before there were marks has one
_PAGE = 999  # names of one listing, as a bucket serves them in one request


@dataclass(frozen=True)
class Due:
    """Of what was put off: each session whose time has come, with its marks; and when the next one's comes."""

    sessions: dict[SessionId, Names]
    next_at: float


async def put(store: Store, session: SessionId, what: str) -> None:
    """Durable on return. A repetition changes nothing."""
    await store.put_if_absent(ObjectKind.COLLECT_NOW.key(session, what), b"")


async def put_off(store: Store, session: SessionId, until: float) -> None:
    """`until`: in seconds since the epoch. Those of now are taken away after it."""
    await store.put_if_absent(ObjectKind.COLLECT_LATER.key(int(until * 1e6), session), b"")


async def listed(store: Store) -> dict[SessionId, Names]:
    """The sessions that are marked now, each with its marks."""
    found: dict[SessionId, Names] = {}
    for name in await store.list(ObjectKind.COLLECT_NOW.under()):
        found.setdefault(layout.marked(name), []).append(name)
    return found


async def due(store: Store, now: float) -> Due:
    """Lists no more than what is due, and a page."""
    found: dict[SessionId, Names] = {}
    after = ""
    while page := await store.list(ObjectKind.COLLECT_LATER.under(), start_after=after, limit=_PAGE):
        for name in page:
            at, session = ObjectKind.COLLECT_LATER.parse(name)
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
    for session in sorted(set(map(layout.owner_of, await store.list(ObjectKind.SESSION.under())))):
        await put(store, session, "found")
    await store.put_if_absent(_BEGUN, b"")
