"""Marks: the sessions in which something is left to collect, now or later.

collect/<session>/<what>    empty; `what` is another for each thing that happens

A mark is put before what it tells of. The collector takes away those that it has seen, once nothing is left for it to
do; so it never has to look through all that is finished, and whatever is not finished is never overlooked.
"""

from collections.abc import Iterable

from knapper.ids import SessionId
from knapper.store import Store, many

_PREFIX = "collect/"
_ALL = "collect-begun"  # is there once every session that was made before there were marks has one


async def put(store: Store, session: SessionId, what: str) -> None:
    """Durable on return. A repetition changes nothing."""
    await store.put_if_absent(f"{_PREFIX}{session}/{what}", b"")


async def listed(store: Store) -> dict[SessionId, frozenset[str]]:
    """The marked sessions, each with its marks."""
    found: dict[SessionId, set[str]] = {}
    for name in await store.list(_PREFIX):
        session, _, what = name.removeprefix(_PREFIX).partition("/")
        found.setdefault(SessionId(session), set()).add(what)
    return {session: frozenset(marks) for session, marks in found.items()}


async def remove(store: Store, session: SessionId, seen: Iterable[str]) -> None:
    await many.each([f"{_PREFIX}{session}/{what}" for what in seen], store.delete)


async def mark_all(store: Store) -> None:
    """Mark every session that there is, once in the life of a store: those of an older knapper have none."""
    if await store.get(_ALL) is not None:
        return
    for session in sorted({name.split("/")[1] for name in await store.list("sessions/")}):
        await put(store, SessionId(session), "found")
    await store.put_if_absent(_ALL, b"")
