"""The interface between journal and engine: a pure step from (state, operation) to (state, outcome)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from knapper.state.journal.records import Operation, Spec

State = TypeVar("State")
Files = Mapping[str, bytes | memoryview]  # part name -> bytes


@dataclass(frozen=True)
class Outcome(Generic[State]):
    """The next state and the result. `export`, of a save: files that are stored before the result is published."""

    state: State
    content_type: Literal["application/json", "application/x-protobuf"]
    body: bytes
    cost_s: float = 0.0  # compute seconds, which a replay costs again
    export: Files = field(default_factory=dict)
    step: int = -1  # optimizer steps in the weights of an export


class Machine(Protocol[State]):
    """Pure: no store, no clock, no randomness of its own.

    Raises UserError for the user's mistakes, and then nothing has changed.

    `apply` gets forward_backward, optim_step and load_weights (with the files of the checkpoint as `source`), and the
    saves, for which it returns the export and an empty body (the journal names the checkpoint and makes the result).
    """

    async def create(self, spec: Spec, source: Files | None, with_optimizer: bool) -> State:
        """The state of a new run, from its seed or from a checkpoint's files."""

    async def apply(self, state: State, operation: Operation, source: Files | None) -> Outcome[State]: ...

    async def serialize(self, state: State) -> Files:
        """The whole state (weights, moments, step count, pending gradients) as files; may share memory with it."""

    def serialized_bytes(self, state: State) -> int:
        """The approximate size of what `serialize` returns. Computes nothing."""

    async def restore(self, spec: Spec, files: Files) -> State:
        """The state that was serialized, bit for bit."""
