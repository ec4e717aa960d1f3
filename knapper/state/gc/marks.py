"""Marks: the sessions with something to collect, now or later.

A mark for now names an event, one mark an event; a mark for later says that nothing can be collected before its time,
unless something happens.

A mark is written before its event. The collector deletes the marks that it has seen, once it has written one for later
or nothing is left to do. So it never lists finished sessions, and never overlooks an unfinished one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from knapper.ids import SessionId
from knapper.state import layout
from knapper.state.layout import ObjectKind
from knapper.store import Names, Store, many

_BEGUN = ObjectKind.COLLECT_BEGUN.key()  # exists once all sessions of earlier releases are marked
_PAGE = 999  # names a listing, as a bucket returns them in one request


@dataclass(frozen=True)
class Due:
    """The postponed sessions that are due, with their marks, and when the next one is due."""

    sessions: dict[SessionId, Names]
    next_at: float


async def put(store: Store, session: SessionId, what: str) -> None:
    """Durable on return. A repetition changes nothing."""
    await store.put_if_absent(ObjectKind.COLLECT_NOW.key(session, what), b"")


async def put_off(store: Store, session: SessionId, until: float) -> None:
    """Write a mark for later; delete those for now afterwards. `until`: seconds since the epoch."""
    await store.put_if_absent(ObjectKind.COLLECT_LATER.key(int(until * 1e6), session), b"")


async def listed(store: Store) -> dict[SessionId, Names]:
    """The sessions with marks for now, each with its marks."""
    sessions: dict[SessionId, Names] = {}
    for name in await store.list(ObjectKind.COLLECT_NOW.under()):
        sessions.setdefault(layout.session_of_mark(name), []).append(name)
    return sessions


async def due(store: Store, now: float) -> Due:
    """Lists the marks that are due, and at most one page more."""
    sessions: dict[SessionId, Names] = {}
    after = ""
    while page := await store.list(ObjectKind.COLLECT_LATER.under(), start_after=after, limit=_PAGE):
        for name in page:
            at, session = ObjectKind.COLLECT_LATER.parse(name)
            if int(at) > now * 1e6:
                return Due(sessions, int(at) / 1e6)
            sessions.setdefault(SessionId(session), []).append(name)
        after = page[-1]
    return Due(sessions, inf)


async def remove(store: Store, seen: Iterable[str]) -> None:
    await many.each(seen, store.delete)


async def mark_all(store: Store) -> None:
    """Mark every session, once in the life of a store: those of earlier releases have no marks."""
    if await store.get(_BEGUN) is not None:
        return
    for session in sorted(set(map(layout.owner_of, await store.list(ObjectKind.SESSION.under())))):
        await put(store, session, "found")
    await store.put_if_absent(_BEGUN, b"")
