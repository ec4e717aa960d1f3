"""The history of a run for reports: newest first, a few records at a time."""

from collections.abc import AsyncIterator

from knapper.ids import RunId
from knapper.state import damage, layout
from knapper.state.journal.records import Commit, Operation, decode
from knapper.store import Names, Store

_AT_ONCE = 32


async def operations(store: Store, run: RunId) -> AsyncIterator[list[Operation]]:
    """Accepted operations except the creation, in groups, without collected and damaged records."""

    async def read(name: str) -> Operation | None:
        data = await store.get(name)
        return None if data is None else decode(data, Operation, name)

    names = await store.list(layout.operations(run), start_after=layout.operation(run, 0))
    for group in _groups(names):
        yield [operation for operation in await damage.readable(group, read) if operation is not None]


async def commits(store: Store, run: RunId) -> AsyncIterator[list[Commit]]:
    """Commits, in groups, without fences and without collected and damaged records."""

    async def read(name: str) -> Commit | None:
        data = await store.get(name)
        return None if data is None else decode(data, Commit, name)

    for group in _groups(await store.list(layout.commits(run))):
        yield [commit for commit in await damage.readable(group, read) if commit is not None and commit.results]


async def commits_after(store: Store, run: RunId, after: int, most: int) -> AsyncIterator[list[tuple[int, Commit]]]:
    """(n, commit) after commit `after`, oldest first, in groups: the newest `most`, without damaged records."""

    async def read(name: str) -> tuple[int, Commit] | None:
        data = await store.get(name)
        return None if data is None else (layout.last_number(name), decode(data, Commit, name))

    names = await store.list(layout.commits(run), start_after=layout.commit(run, after) if after else "")
    for group in reversed(_groups(names[-most:])):
        yield [commit for commit in await damage.readable(group[::-1], read) if commit is not None]


def _groups(names: Names) -> list[Names]:
    newest_first = names[::-1]
    return [newest_first[at : at + _AT_ONCE] for at in range(0, len(newest_first), _AT_ONCE)]
