"""What training and vLLM hand to each other where both are in one process, on one card: adapters, as soon as they are
saved, and the memory of a vLLM that sleeps.

A save is answered once its bundle is durable, here as anywhere. While the store takes it, its adapter goes to vLLM's
memory file system as well. A sample names the bundle, whose index says which content is meant: so nothing is sampled
that is not durable, and what is need not be read from the store again.
"""

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Final, Protocol

from knapper.state.journal.machine import Files, Machine, Outcome
from knapper.state.journal.records import Operation, Spec

if TYPE_CHECKING:  # torch may be missing or broken, which only a gate may find out
    from knapper.engine.training.trainer import RunState

_FOR_SAMPLERS: Final = "save_weights_for_sampler"

Taker = Callable[[Spec, Files], None]


class Borrower(Protocol):
    async def lend(self) -> None:
        """It may use more memory from now on."""

    async def reclaim(self) -> None:
        """It has given that memory back when this returns."""


class Handover:
    """Between the engine and vLLM of a process; without one of them nothing is handed over."""

    def __init__(self) -> None:
        self._takers: list[Taker] = []
        self._borrower: Borrower | None = None

    def to(self, taker: Taker) -> None:
        """`taker` is called for each adapter that is saved for a sampler from now on, on the event loop."""
        self._takers.append(taker)

    def saved(self, spec: Spec, files: Files) -> None:
        for taker in self._takers:
            taker(spec, files)

    def lends_to(self, borrower: Borrower) -> None:
        """`borrower` has vLLM's memory while that sleeps."""
        self._borrower = borrower

    async def lend(self) -> None:
        if self._borrower is not None:
            await self._borrower.lend()

    async def reclaim(self) -> None:
        if self._borrower is not None:
            await self._borrower.reclaim()


@cache
def handover() -> Handover:
    """This process's."""
    return Handover()


class HandingMachine:
    """knapper.state.journal.machine.Machine, whose saves for samplers are told to `saved` before they are stored."""

    def __init__(self, machine: "Machine[RunState]", saved: Taker) -> None:
        self._machine, self._saved = machine, saved

    async def create(self, spec: Spec, source: Files | None, with_optimizer: bool) -> "RunState":
        return await self._machine.create(spec, source, with_optimizer)

    async def apply(self, state: "RunState", operation: Operation, source: Files | None) -> "Outcome[RunState]":
        outcome = await self._machine.apply(state, operation, source)
        if operation.kind == _FOR_SAMPLERS:
            self._saved(state.spec, outcome.export)
        return outcome

    async def serialize(self, state: "RunState") -> Files:
        return await self._machine.serialize(state)

    def serialized_bytes(self, state: "RunState") -> int:
        return self._machine.serialized_bytes(state)

    async def restore(self, spec: Spec, files: Files) -> "RunState":
        return await self._machine.restore(spec, files)
