"""Read what happened to a run, newest first and a few records at a time: for reports, not for the work itself."""

from collections.abc import AsyncIterator

from knapper.ids import RunId
from knapper.state import damage, layout
from knapper.state.journal.records import Commit, Operation, decode
from knapper.store import Names, Store

_AT_ONCE = 32


async def operations(store: Store, run: RunId) -> AsyncIterator[list[Operation]]:
    """What was accepted, without its creation, in groups. Swept records are left out, and damaged ones."""

    async def read(name: str) -> Operation | None:
        data = await store.get(name)
        return None if data is None else decode(data, Operation, name)

    listed = await store.list(layout.operations(run), start_after=layout.operation(run, 0))
    for group in _groups(listed):
        yield [found for found in await damage.readable(group, read) if found is not None]


async def commits(store: Store, run: RunId) -> AsyncIterator[list[Commit]]:
    """What was answered, and when, in groups. Fences, swept and damaged records are left out."""

    async def read(name: str) -> Commit | None:
        data = await store.get(name)
        return None if data is None else decode(data, Commit, name)

    for group in _groups(await store.list(layout.commits(run))):
        yield [found for found in await damage.readable(group, read) if found is not None and found.results]


def _groups(listed: Names) -> list[Names]:
    newest_first = listed[::-1]
    return [newest_first[at : at + _AT_ONCE] for at in range(0, len(newest_first), _AT_ONCE)]
