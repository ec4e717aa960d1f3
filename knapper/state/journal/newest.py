"""Finds the newest of numbered records without reading the older ones.

Numbers are consecutive and the highest wins. Old records may be deleted, the newest never is, so the search relies on
that one alone. Beside writers it finds the record that was newest at its start, or a newer one.
"""

from knapper.errors import Unavailable
from knapper.ids import RunId, number
from knapper.state import layout
from knapper.state.journal.records import Manifest, decode
from knapper.store import Store
from knapper.store.cache import LruCache

PAGE = 999  # names a listing: a bucket returns a thousand a request, perhaps with the one to start after
_ATTEMPTS_MAX = 4


async def newest_name(store: Store, prefix: str, after: int = 0) -> str:
    """The name with the highest number below the prefix, empty if there is none above `after`.

    Costs one listing if at most 999 names follow `after`, a number that existed; two more for each doubling of them.
    """
    page = await store.list(prefix, start_after=f"{prefix}{number(after)}" if after else "", limit=PAGE)
    if len(page) < PAGE:
        return page[-1] if page else ""
    step = PAGE
    while ahead := await _page_after(store, prefix, layout.last_number(page[-1]) + step):
        if len(ahead) < PAGE:
            return ahead[-1]
        page, step = ahead, 2 * step
    return await _between(store, prefix, page[-1], layout.last_number(page[-1]) + step)


async def newest_of_few(store: Store, prefix: str) -> tuple[int, bytes | None]:
    """(n, bytes) of the newest of records 1, 2, 3, ... below the prefix, or (0, None). Reads one after another.

    For records that change rarely: a read costs a tenth of a listing, and cannot lag behind writes.
    """
    n, newest = 0, None
    while (data := await store.get(f"{prefix}{number(n + 1)}")) is not None:
        n, newest = n + 1, data
    return n, newest


async def _between(store: Store, prefix: str, low: str, high: int) -> str:
    """The newest name, where `low` exists and nothing was above `high`."""
    while high - layout.last_number(low) > PAGE:
        middle = (layout.last_number(low) + high) // 2
        if page := await _page_after(store, prefix, middle):
            low = page[-1]
            if len(page) < PAGE:
                return low
        else:
            high = middle
    page = await _page_after(store, prefix, layout.last_number(low))
    return page[-1] if page else low


async def _page_after(store: Store, prefix: str, n: int) -> list[str]:
    return await store.list(prefix, start_after=f"{prefix}{number(n)}", limit=PAGE)


class Manifests:
    """The newest manifest of each run. Those that this process has seen shorten the next search."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: LruCache[RunId, tuple[int, Manifest]] = LruCache()

    def seen(self, run: RunId) -> tuple[int, Manifest] | None:
        """(n, manifest) from memory, perhaps no longer the newest."""
        return self._seen.known(run)

    def remember(self, run: RunId, n: int, manifest: Manifest) -> None:
        """Manifest `n` of the run was stored by this process."""
        self._seen.keep(run, (n, manifest))

    async def newest(self, run: RunId) -> tuple[int, Manifest] | None:
        """(n, manifest) of the highest n, or None if the run was never claimed."""
        for _ in range(_ATTEMPTS_MAX):
            seen = self._seen.known(run)
            name = await newest_name(self._store, layout.manifests(run), after=seen[0] - 1 if seen else 0)
            if seen is not None and name == layout.manifest(run, seen[0]):
                return seen
            if not name and seen is None:
                return None
            data = await self._store.get(name) if name else None
            if data is not None:
                newest = layout.last_number(name), decode(data, Manifest, name)
                self._seen.keep(run, newest)
                return newest
            self._seen.forget(run)  # superseded and deleted just now, or the store was set back to an older copy
        raise Unavailable(f"the newest manifest of {run} was superseded each time that it was read; try again")
