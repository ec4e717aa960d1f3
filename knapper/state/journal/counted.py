"""A machine whose operations are counted and timed for the metrics."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import structlog

from knapper.errors import UserError
from knapper.observability import metrics
from knapper.state.journal.machine import Files, Machine, Outcome
from knapper.state.journal.records import Operation, Spec

log = structlog.get_logger()
State = TypeVar("State")


class CountedMachine(Generic[State]):
    """Counts operations, device seconds, and how long the first adapter and the first step take."""

    def __init__(self, machine: Machine[State], now: Callable[[], float] = time.monotonic) -> None:  # noqa: TID251  measured for metrics, decides nothing
        self._machine, self._now = machine, now
        self._first = {"adapter": True, "first_step": True}

    async def create(self, spec: Spec, source: Files | None, with_optimizer: bool) -> State:
        with self._started("adapter"):
            return await self._machine.create(spec, source, with_optimizer)

    async def restore(self, spec: Spec, files: Files) -> State:
        with self._started("adapter"):
            return await self._machine.restore(spec, files)

    async def serialize(self, state: State) -> Files:
        return await self._machine.serialize(state)

    def serialized_bytes(self, state: State) -> int:
        return self._machine.serialized_bytes(state)

    async def apply(self, state: State, operation: Operation, source: Files | None) -> Outcome[State]:
        outcome = "failed"
        try:
            with self._started("first_step"):
                result = await self._machine.apply(state, operation, source)
            outcome = "ok"
            metrics.device_seconds.labels(operation.kind).inc(result.cost_s)
            log.debug("applied", run=operation.run, seq=operation.seq, kind=operation.kind, device_s=result.cost_s)
            return result
        except UserError:
            outcome = "refused"
            raise
        finally:
            metrics.operations.labels(operation.kind, outcome).inc()

    @contextmanager
    def _started(self, stage: str) -> Iterator[None]:
        began, is_first = self._now(), self._first[stage]
        self._first[stage] = False
        yield
        if is_first:
            metrics.stage(stage, self._now() - began)
