"""A small machine for the simulation.

Real AdamW arithmetic on a vector, so that order, loss and repetition all change the bits.
"""

from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from knapper.errors import UserError
from knapper.state.journal.machine import Files, Outcome
from knapper.state.journal.records import Operation, Spec

SIZE = 8
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class LedgerState:
    weights: Vector
    m: Vector
    v: Vector
    grads: Vector
    step: int

    def bytes(self) -> bytes:
        vectors = (self.weights, self.m, self.v, self.grads)
        return b"".join(x.tobytes() for x in vectors) + self.step.to_bytes(8, "little")


def _parse(data: bytes) -> LedgerState:
    w, m, v, g = np.frombuffer(data[: 16 * SIZE], np.float32).reshape(4, SIZE)
    return LedgerState(w, m, v, g, int.from_bytes(data[16 * SIZE :], "little"))


class LedgerMachine:
    async def create(self, spec: Spec, source: Files | None, with_optimizer: bool) -> LedgerState:
        zero = np.zeros(SIZE, np.float32)
        fresh = LedgerState(np.random.default_rng(spec.seed).random(SIZE, np.float32), zero, zero, zero, 0)
        return fresh if source is None else self._loaded(source, with_optimizer)

    async def apply(self, state: LedgerState, operation: Operation, source: Files | None) -> Outcome[LedgerState]:
        body = operation.body()
        if operation.kind == "forward_backward":
            if body == b"wrong":
                raise UserError("datum 0 is wrong")
            x = np.frombuffer(body, np.float32)
            loss = np.float32(((state.weights - x) ** 2).sum())
            grads = np.float32(state.grads * np.float32(0.999)) + (state.weights - x)  # order matters to the bits
            return self._outcome(replace(state, grads=grads), {"loss": float(loss)}, cost_s=9.0)
        if operation.kind == "optim_step":
            m = np.float32(0.9) * state.m + np.float32(0.1) * state.grads
            v = np.float32(0.95) * state.v + np.float32(0.05) * state.grads * state.grads
            change = (np.float32(0.05) * m / (np.sqrt(v) + np.float32(1e-12))).astype(np.float32)
            weights = state.weights - change
            after = LedgerState(weights, m, v, np.zeros(SIZE, np.float32), state.step + 1)
            return self._outcome(after, {"step": after.step}, cost_s=1.0)
        if operation.kind == "load_weights":
            assert source is not None
            return self._outcome(self._loaded(source, msgspec.json.decode(body)["optimizer"]), {"loaded": True}, 0.0)
        optimizer = {"optimizer.safetensors": state.bytes()} if operation.kind == "save_weights" else {}
        return Outcome(state, "application/json", b"", 0.0, {"weights": state.weights.tobytes(), **optimizer})

    async def serialize(self, state: LedgerState) -> Files:
        return {"state": state.bytes()}

    def serialized_bytes(self, state: LedgerState) -> int:
        return len(state.bytes())

    async def restore(self, spec: Spec, files: Files) -> LedgerState:
        return _parse(bytes(files["state"]))

    @staticmethod
    def _loaded(source: Files, with_optimizer: bool) -> LedgerState:
        if with_optimizer:
            return replace(_parse(bytes(source["optimizer.safetensors"])), grads=np.zeros(SIZE, np.float32))
        zero = np.zeros(SIZE, np.float32)
        return LedgerState(np.frombuffer(bytes(source["weights"]), np.float32), zero, zero, zero, 0)

    @staticmethod
    def _outcome(state: LedgerState, answer: dict[str, object], cost_s: float) -> Outcome[LedgerState]:
        return Outcome(state, "application/json", msgspec.json.encode(answer), cost_s)
