"""What ranks tell each other, in msgpack: the processes are one program, and no message leaves the pod.

A lane is a rank's part of a pass: a micro-batch of each of some requests. Adapters' weights and gradients go beside
the messages, as tensors.
"""

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knapper.engine.training.batch import MicroBatch, PendingRequest
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.state.journal.records import Spec
from knapper.wire.types import Datum


class Array(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: NDArray[Any]) -> "Array":
        return cls(array.dtype.str, array.shape, array.tobytes())

    def array(self) -> NDArray[Any]:
        return np.frombuffer(self.data, dtype=np.dtype(self.dtype)).reshape(self.shape).copy()


Arrays = dict[str, Array]


class LaneDatum(msgspec.Struct, frozen=True):
    tokens: Array
    inputs: Arrays


class LaneRequest(msgspec.Struct, frozen=True):
    """One request's micro-batch; `first`: the index of its first datum in the request."""

    spec: Spec
    loss: str
    config: dict[str, float]
    differentiates: bool
    first: int
    data: list[LaneDatum]

    @classmethod
    def of(cls, spec: Spec, request: PendingRequest, batch: MicroBatch) -> "LaneRequest":
        data = [
            LaneDatum(Array.of(datum.tokens), {name: Array.of(values) for name, values in datum.inputs.items()})
            for datum in batch.data
        ]
        return cls(spec, request.loss.name, dict(request.config), request.differentiates, batch.first, data)

    def micro_batch(self) -> MicroBatch:
        data = [
            Datum(datum.tokens.array(), {name: values.array() for name, values in datum.inputs.items()})
            for datum in self.data
        ]
        prefixes = Prefixes()
        for datum in data:
            prefixes.add(datum.tokens)
        return MicroBatch(self.first, data, prefixes)


class Lane(msgspec.Struct, frozen=True):
    requests: list[LaneRequest]


class RequestResult(msgspec.Struct, frozen=True):
    """Of a micro-batch: by datum its outputs and metrics. `error`: a user's mistake, which ends the request."""

    outputs: list[Arrays]
    metrics: list[dict[str, float]]
    error: str | None

    @classmethod
    def of(cls, request: PendingRequest) -> "RequestResult":
        outputs = [{name: Array.of(array) for name, array in output.items()} for output in request.outputs]
        return cls(outputs, request.datum_metrics, None if request.error is None else str(request.error))


class LaneResult(msgspec.Struct, frozen=True):
    """`lacked_memory`, `defect`: why there are no results."""

    requests: list[RequestResult] = []
    lacked_memory: bool = False
    defect: str = ""


def encode(message: Lane | LaneResult) -> bytes:
    return msgspec.msgpack.encode(message)


def decode_lane(body: bytes) -> Lane:
    return msgspec.msgpack.decode(body, type=Lane)


def decode_result(body: bytes) -> LaneResult:
    return msgspec.msgpack.decode(body, type=LaneResult)
