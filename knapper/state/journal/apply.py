"""Applies one operation: a step of the machine, with the files that it loads and exports."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Generic

import msgspec

from knapper.errors import KnapperError, OutOfMemory, Unavailable, UserError
from knapper.ids import RunId
from knapper.state.journal import bundles
from knapper.state.journal.exports import Saves
from knapper.state.journal.machine import Files, Machine, Outcome, State
from knapper.state.journal.records import SAVES, Creation, Operation, Result
from knapper.store import Store

_ATTEMPTS_MAX: Final = 3  # of an operation that fails by a defect of the server; then its result is that error


Earlier = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Applied(Generic[State]):
    """`outcome`: None if the operation failed, which leaves the state unchanged."""

    result: Result
    outcome: Outcome[State] | None = None


class Applier(Generic[State]):
    """Applies the operations of one claim. It holds no state of the run, only how often an operation has failed."""

    def __init__(self, store: Store, run: RunId, creation: Creation, machine: Machine[State], saves: Saves) -> None:
        self._store, self._run, self._creation = store, run, creation
        self._machine, self._saves = machine, saves
        self._failed = (-1, 0)  # (operation, how often it failed by a defect)

    async def apply(self, operation: Operation, state: State | None, epoch: int, earlier: Earlier) -> Applied[State]:
        """Raises Unavailable, or another error that is not the user's: nothing has changed, and a retry is safe.

        `earlier` returns once the results of all earlier operations are durable: a save names nothing before.
        """
        if operation.kind == "tombstone":
            return Applied(_failure(operation, operation.error, "user"))
        try:
            return await self._succeed(operation, state, epoch, earlier)
        except OutOfMemory as error:  # other runs may free some in a moment
            return Applied(self._given_up(operation, error, f": {error}", "user"))
        except UserError as error:
            return Applied(_failure(operation, str(error), "user"))
        except KnapperError:
            raise
        except Exception as error:  # noqa: BLE001  any defect: tried again, then reported
            return Applied(self._given_up(operation, error, f", by a defect of the server: {error!r}", "server"))

    def _given_up(self, operation: Operation, error: Exception, why: str, category: str) -> Result:
        """The result of an operation that has failed too often. Raises Unavailable before that, for a retry."""
        seq, times = self._failed
        times = times + 1 if seq == operation.seq else 1
        self._failed = (operation.seq, times)
        if times < _ATTEMPTS_MAX:
            raise Unavailable(f"operation {operation.seq} of {self._run} failed: {error!r}") from error
        return _failure(operation, f"operation {operation.seq} failed {times} times{why}", category)

    async def _succeed(self, operation: Operation, state: State | None, epoch: int, earlier: Earlier) -> Applied[State]:
        source = await self._saves.source(operation, self._creation.spec) if operation.kind == "load_weights" else ""
        if operation.kind in SAVES:
            await self._saves.check(operation)
        if operation.seq == 0 and self._creation.source:
            await self._saves.check_source(self._creation.source)
        outcome = await self.step(operation, state, source)
        body = outcome.body
        if outcome.export:
            spec = self._creation.spec
            export = await self._saves.store(operation, spec, epoch, outcome.export, outcome.step)
            await earlier()  # by now a process that lost its claim knows it, and names nothing
            body = await self._saves.name(operation, spec, export)
        result = Result(
            seq=operation.seq, sha256=operation.sha256, content_type=outcome.content_type, body=body, source=source
        )
        return Applied(result, outcome)

    async def step(self, operation: Operation, state: State | None, source: str) -> Outcome[State]:
        """One step of the machine. `source`: the bundle to load, or empty."""
        if operation.seq == 0:
            creation = self._creation
            files = (await bundles.read(self._store, creation.source))[1] if creation.source else None
            new = await self._machine.create(creation.spec, files, creation.with_optimizer)
            kind = "load_weights" if creation.source else "create_model"  # the SDK checks it
            body = msgspec.json.encode({"type": kind, "model_id": self._run})
            return Outcome(state=new, content_type="application/json", body=body)
        if state is None:
            raise UserError(
                f"{self._run} was never made: its creation failed, with the error in its result; create another"
            )
        loaded: Files | None = (await bundles.read(self._store, source))[1] if source else None
        return await self._machine.apply(state, operation, loaded)


def _failure(operation: Operation, error: str, category: str) -> Result:
    body = msgspec.json.encode({"error": error, "category": category})
    return Result(seq=operation.seq, sha256=operation.sha256, content_type="application/json", body=body, failed=True)
