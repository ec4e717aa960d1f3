"""Counts and times the calls of a store: `knapper_store_calls` and `knapper_store_seconds`."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from knapper.observability import metrics
from knapper.store import Names, Store, forget_torn_writes


@dataclass(frozen=True)
class CountedStore:
    """The store, counted."""

    store: Store
    now: Callable[[], float] = time.monotonic  # noqa: TID251  measured for metrics, decides nothing

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._counted("put_if_absent") as set_outcome:
            created = await self.store.put_if_absent(name, data)
            set_outcome("ok" if created else "lost")
            return created

    async def get(self, name: str) -> bytes | None:
        with self._counted("get") as set_outcome:
            data = await self.store.get(name)
            set_outcome("missing" if data is None else "ok")
            return data

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        with self._counted("list") as set_outcome:
            names = await self.store.list(prefix, start_after, limit)
            set_outcome("ok")
            return names

    async def delete(self, name: str) -> None:
        with self._counted("delete") as set_outcome:
            await self.store.delete(name)
            set_outcome("ok")

    async def forget_torn_writes(self, now: float) -> int:
        return await forget_torn_writes(self.store, now)

    @contextmanager
    def _counted(self, verb: str) -> Iterator[Callable[[str], None]]:
        began, outcome = self.now(), ["failed"]
        try:
            yield lambda value: outcome.__setitem__(0, value)
        finally:
            metrics.store_calls.labels(verb, outcome[0]).inc()
            metrics.store_seconds.labels(verb).observe(self.now() - began)
