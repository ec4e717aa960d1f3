"""A run's operations, read one ahead: the next comes from the store while its reader works on the one before."""

from knapper.concurrency.tasks import Spawn, Task
from knapper.errors import KnapperError, damaged
from knapper.ids import RunId
from knapper.state import layout
from knapper.state.journal.records import Operation, decode
from knapper.store import Store


class Operations:
    """Reads the operations of one run. In memory is at most one that was not asked for yet."""

    def __init__(self, store: Store, run: RunId, spawn: Spawn) -> None:
        self._store, self._run, self._spawn = store, run, spawn
        self._ahead: tuple[int, Task[Operation | None]] | None = None

    async def read(self, seq: int) -> Operation | None:
        """The operation, or None if the store has none of this number. Raises Corrupt."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == seq and (operation := await ahead[1]) is not None:
            return operation
        return await self._read(seq)  # what was not there a moment ago may have come

    def read_ahead(self, seq: int) -> None:
        """Begin to read the operation, for a `read` to come. Errors are left to that one, which tries again."""
        self._ahead = (seq, self._spawn(self._try_to_read(seq)))

    async def _try_to_read(self, seq: int) -> Operation | None:
        try:
            return await self._read(seq)
        except KnapperError:
            return None

    async def _read(self, seq: int) -> Operation | None:
        name = layout.operation(self._run, seq)
        data = await self._store.get(name)
        if data is None:
            return None
        operation = decode(data, Operation, name)
        if (operation.run, operation.seq) != (self._run, seq):
            raise damaged(name, f"fields run and seq say that it is operation {operation.seq} of {operation.run}")
        return operation
