"""A store whose calls are counted and timed: `knapper_store_calls` and `knapper_store_seconds`."""

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
    now: Callable[[], float] = time.monotonic  # noqa: TID251  what it takes is measured, and decides nothing

    async def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._counted("put_if_absent") as say:
            won = await self.store.put_if_absent(name, data)
            say("ok" if won else "lost")
            return won

    async def get(self, name: str) -> bytes | None:
        with self._counted("get") as say:
            data = await self.store.get(name)
            say("missing" if data is None else "ok")
            return data

    async def list(self, prefix: str, start_after: str = "", limit: int = 0) -> Names:
        with self._counted("list") as say:
            names = await self.store.list(prefix, start_after, limit)
            say("ok")
            return names

    async def delete(self, name: str) -> None:
        with self._counted("delete") as say:
            await self.store.delete(name)
            say("ok")

    async def forget_torn_writes(self, now: float) -> int:
        return await forget_torn_writes(self.store, now)

    @contextmanager
    def _counted(self, verb: str) -> Iterator[Callable[[str], None]]:
        began, outcome = self.now(), ["failed"]
        try:
            yield lambda said: outcome.__setitem__(0, said)
        finally:
            metrics.store_calls.labels(verb, outcome[0]).inc()
            metrics.store_seconds.labels(verb).observe(self.now() - began)
