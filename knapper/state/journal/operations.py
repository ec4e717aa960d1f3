"""A run's operations, read two ahead: they come from the store while their reader works on the one before."""

from typing import Final

from knapper.concurrency.tasks import Spawn, Task
from knapper.errors import KnapperError, damaged
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.records import Operation, decode
from knapper.store import Store

_AHEAD: Final = 2  # an optimizer step may be shorter than the read of the pass after it


class Operations:
    """Reads the operations of one run. In memory are at most two that were not asked for yet."""

    def __init__(self, store: Store, run: RunId, spawn: Spawn) -> None:
        self._store, self._run, self._spawn = store, run, spawn
        self._ahead: dict[int, Task[Operation | None]] = {}
        self._missing = set[int]()  # of those: looked for in vain

    async def read(self, seq: int) -> Operation | None:
        """The operation, or None if the store has none of this number. Raises Corrupt."""
        ahead = self._ahead.pop(seq, None)
        if ahead is not None and (operation := await ahead) is not None:
            return operation
        return await self._read(seq)  # what was not there a moment ago may have come

    def read_ahead(self, seq: int) -> None:
        """Begin to read the operations from this one on, for `read`s to come.

        Errors are left to those, which try again.
        """
        wanted = range(seq, seq + _AHEAD)
        known = {n: self._ahead[n] for n in wanted if n in self._ahead and n not in self._missing}
        self._missing.clear()
        self._ahead = {n: known.get(n) or self._spawn(self._try_to_read(n)) for n in wanted}

    async def _try_to_read(self, seq: int) -> Operation | None:
        try:
            operation = await self._read(seq)
        except KnapperError:
            operation = None
        if operation is None:
            self._missing.add(seq)
        return operation

    async def _read(self, seq: int) -> Operation | None:
        name = layout.operation(self._run, seq)
        data = await self._store.get(name)
        if data is None:
            return None
        operation = decode(data, Operation, name)
        if (operation.run, operation.seq) != (self._run, seq):
            raise damaged(name, f"fields run and seq say that it is operation {operation.seq} of {operation.run}")
        return operation
