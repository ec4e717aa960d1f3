"""Pending forward_backward requests, and one pass of the model over micro-batches of several of them.

A request is cut into micro-batches independently of others. A pass computes micro-batches of any runs together, and
each has the bits that it has alone: a row's bits do not depend on the number of rows, an adapter's gradient comes from
its own rows only, and each request has its own loss.

N rows of all sequences, U computed rows (`Prefixes`), M distinct (row, targets) of the head, K targets.
"""

import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from knapper.engine.executor import Work
from knapper.engine.images.placed import PlacedImage
from knapper.engine.layers.head import HeadLora
from knapper.engine.layers.layerwise import HEAD_PART, Gather, LayerwisePass
from knapper.engine.layers.lora import Lora
from knapper.engine.models.base import Model
from knapper.engine.models.config import HEAD
from knapper.engine.training import divergence
from knapper.engine.training.losses import Loss
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.engine.transfer import to_device
from knapper.errors import UserError
from knapper.wire.types import Datum, ForwardBackwardOutput

T = TypeVar("T")

_ATTENDED_TIMES = 4  # sequences of a micro-batch have at most this many times its computed rows

_HEAD_ROWS = 128  # of several requests in one product: saturates it, and others wait for one such product at most


@dataclass(frozen=True)
class MicroBatch:
    """Some datums of a request; `first` is the index of the first."""

    first: int
    data: Sequence[Datum]
    prefixes: Prefixes

    @property
    def rows(self) -> int:
        """Rows to compute."""
        return len(self.prefixes)


@dataclass
class PendingRequest:
    """One request in progress. Gradients are added to `sums_P`; None: forward only.

    `error` ends it and leaves the run unchanged.
    """

    lora: Lora
    loss: Loss
    config: dict[str, float]
    sums_P: Tensor | None
    waiting: deque[MicroBatch]
    data: Sequence[Datum] = ()
    outputs: list[dict[str, np.ndarray]] = field(default_factory=list)
    datum_metrics: list[dict[str, float]] = field(default_factory=list)  # of each of `outputs`
    error: UserError | None = None

    @property
    def differentiates(self) -> bool:
        return self.sums_P is not None

    @property
    def done(self) -> bool:
        return not self.waiting or self.error is not None

    def output(self) -> ForwardBackwardOutput:
        """Raises `error`."""
        if self.error is not None:
            raise self.error
        metrics: dict[str, float] = {}
        for of_datum in self.datum_metrics:
            for name, value in of_datum.items():
                metrics[name] = metrics.get(name, 0.0) + value
        return ForwardBackwardOutput(self.outputs, metrics | divergence.metrics(self.data, self.outputs))


def micro_batches(
    data: Sequence[Datum], rows_max: int, images: Sequence[Sequence[PlacedImage]] | None = None
) -> Iterator[MicroBatch]:
    """In order, cut between datums: each has at most `rows_max` rows to compute, or is one datum.

    `images`: of each datum; None: there are none.
    """
    first, prefixes = 0, Prefixes()
    for index, datum in enumerate(data):
        seen = images[index] if images is not None else ()
        rows = len(prefixes) + prefixes.new_rows(datum.tokens, seen)
        if index > first and (rows > rows_max or prefixes.total + len(datum.tokens) > _ATTENDED_TIMES * rows_max):
            yield MicroBatch(first, data[first:index], prefixes)
            first, prefixes = index, Prefixes()
        prefixes.add(datum.tokens, seen)
    yield MicroBatch(first, data[first:], prefixes)


def compute(model: Model, requests: Sequence[PendingRequest], gather: Gather | None = None) -> Work[None]:
    """The next micro-batch of each request, in one forward and backward. All of them differentiate, or none does.
    `gather`: how the pass has the model's weights whole; None: the model's own way.

    Yields after every layer, forward and backward, and after each batch of the head. A request whose loss is not finite
    has `error` afterwards; the others are unaffected.
    """
    batches = [request.waiting.popleft() for request in requests]
    gather = gather or model.gather
    layer_pass = LayerwisePass(differentiates=requests[0].differentiates, gather=gather)
    embedded_UH, layer_segments = model.layer_segments(
        [batch.prefixes for batch in batches], [request.lora for request in requests]
    )
    rows_UH = yield from layer_pass.forward(embedded_UH, layer_segments)
    inputs = [_HeadInputs.of(request.loss, batch) for request, batch in zip(requests, batches, strict=True)]
    grads = list(rows_UH.split([batch.rows for batch in batches]))
    with gather(HEAD_PART, -1 if requests[0].differentiates else 1):
        for indices in _head_batches(requests, inputs):
            head_grads = _head(
                model, _take(requests, indices), _take(batches, indices), _take(inputs, indices), _take(grads, indices)
            )
            for index, grad in zip(indices, head_grads, strict=True):
                grads[index] = grad
            yield
    yield from layer_pass.backward(torch.cat(grads))


def _head(
    model: Model,
    requests: Sequence[PendingRequest],
    batches: Sequence[MicroBatch],
    inputs: Sequence["_HeadInputs"],
    hidden: Sequence[Tensor],
) -> list[Tensor]:
    """The losses' gradient in each request's rows, zeros if none differentiates. Adds that of a head's adapter."""
    leaves = [rows_UH.detach().requires_grad_(rows_UH.requires_grad) for rows_UH in hidden]
    with torch.set_grad_enabled(requests[0].differentiates):
        logprobs = _logprobs(model, requests, batches, inputs, leaves)
        losses = [_losses_of(model, *of_request) for of_request in zip(requests, batches, logprobs, strict=True)]
    sums = [loss for loss in losses if loss is not None]
    if sums and requests[0].differentiates:
        torch.stack(sums).sum().backward()
    return [  # of a failed request it may be 0 * NaN
        torch.zeros_like(rows_UH) if request.error is not None or rows_UH.grad is None else rows_UH.grad
        for request, rows_UH in zip(requests, leaves, strict=True)
    ]


def _losses_of(model: Model, request: PendingRequest, batch: MicroBatch, logprobs: Sequence[Tensor]) -> Tensor | None:
    """The sum of the datums' losses; outputs and metrics are added to the request. None if it failed.

    `logprobs`: the targets' log-probabilities, by datum.
    """
    datum_inputs = _inputs(batch.data, model.device)
    losses = [
        request.loss(p, loss_inputs, request.config) for p, loss_inputs in zip(logprobs, datum_inputs, strict=True)
    ]
    totals = torch.stack([loss.total for loss in losses])
    names = list(losses[0].metrics)
    metrics = torch.stack([torch.stack([loss.metrics[name].float() for name in names]) for loss in losses])
    outputs = {"logprobs": [p.detach() for p in logprobs]}
    if request.loss.returns_terms:
        outputs["elementwise_loss"] = [loss.terms for loss in losses]
    values, rows, *arrays = _arrays([totals.detach(), metrics, *itertools.chain(*outputs.values())])
    for index, value in enumerate(values.tolist()):
        if not math.isfinite(value):
            request.error = _not_finite(batch.first + index, request.loss, value, logprobs[index])
            return None
    by_output = [arrays[start : start + len(losses)] for start in range(0, len(arrays), len(losses))]
    request.outputs += [dict(zip(outputs, by_datum, strict=True)) for by_datum in zip(*by_output, strict=True)]
    request.datum_metrics += [dict(zip(names, row, strict=True)) for row in rows.tolist()]
    return totals.sum()


def _arrays(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Each in its shape; in one transfer."""
    flat = torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()
    parts = np.split(flat, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _inputs(data: Sequence[Datum], device: torch.device) -> list[dict[str, Tensor]]:
    """The loss inputs of each datum without its targets; one transfer a name."""
    by_datum: list[dict[str, Tensor]] = [{} for _ in data]
    for name in dict.fromkeys(name for datum in data for name in datum.inputs if name != "target_tokens"):
        with_input = [index for index, datum in enumerate(data) if name in datum.inputs]
        arrays = [data[index].inputs[name] for index in with_input]
        flat = to_device(np.concatenate([array.ravel() for array in arrays]), device)
        for index, array, part in zip(with_input, arrays, flat.split([array.size for array in arrays]), strict=True):
            by_datum[index][name] = part.view(array.shape)
    return by_datum


@dataclass(frozen=True)
class _HeadInputs:
    """A micro-batch's input to the head. Without `rows_M` and `rows_N`: all rows, in order."""

    rows_M: np.ndarray | None
    rows_N: np.ndarray | None
    targets_MK: np.ndarray
    needed_M: np.ndarray

    @classmethod
    def of(cls, loss: Loss, batch: MicroBatch) -> "_HeadInputs":
        targets = [datum.inputs["target_tokens"] for datum in batch.data]
        columns = max(1 if target.ndim == 1 else target.shape[1] for target in targets)
        targets_NK = np.concatenate([_widened(target, columns) for target in targets])
        needed_N = np.concatenate([loss.needs_gradient(datum.inputs) for datum in batch.data])
        if batch.rows == batch.prefixes.total:
            return cls(None, None, targets_NK, needed_N)
        rows_M, rows_N, targets_MK, needed_M = _distinct(batch.prefixes.rows_N, targets_NK, needed_N)
        return cls(rows_M, rows_N, targets_MK, needed_M)


def _head_batches(requests: Sequence[PendingRequest], inputs: Sequence[_HeadInputs]) -> list[list[int]]:
    """Groups requests into products of the head; a row keeps its bits there too.

    A head with an adapter goes alone. So do requests with another number of targets, whose gradients add in another
    order.
    """
    open_batches: dict[int, list[int]] = {}  # by number of targets: batches that have rows left
    row_counts: dict[int, int] = {}
    batches: list[list[int]] = []
    for index, (request, request_inputs) in enumerate(zip(requests, inputs, strict=True)):
        rows_of_request, columns = request_inputs.targets_MK.shape
        if HEAD in request.lora.a:
            batches.append([index])
        elif columns in open_batches and row_counts[columns] + rows_of_request <= _HEAD_ROWS:
            open_batches[columns].append(index)
            row_counts[columns] += rows_of_request
        else:
            open_batches[columns], row_counts[columns] = [index], rows_of_request
            batches.append(open_batches[columns])
    return batches


def _logprobs(
    model: Model,
    requests: Sequence[PendingRequest],
    batches: Sequence[MicroBatch],
    inputs: Sequence[_HeadInputs],
    hidden: Sequence[Tensor],
) -> list[list[Tensor]]:
    """Log-probabilities by request and datum, in the shape of its targets. A head's adapter is of one request."""
    lora = requests[0].lora
    logprobs_MK = model.target_logprobs(
        torch.cat(
            [_selected(rows_UH, request_inputs.rows_M) for rows_UH, request_inputs in zip(hidden, inputs, strict=True)]
        ),
        to_device(np.concatenate([request_inputs.targets_MK for request_inputs in inputs]), model.device),
        HeadLora(lora.a[HEAD], lora.b[HEAD], lora.scale) if HEAD in lora.a else None,
        np.concatenate([request_inputs.needed_M for request_inputs in inputs]),
    )
    logprobs: list[list[Tensor]] = []
    parts = logprobs_MK.split([len(request_inputs.needed_M) for request_inputs in inputs])
    for request_inputs, batch, of_request_MK in zip(inputs, batches, parts, strict=True):
        by_datum = zip(
            batch.data, _selected(of_request_MK, request_inputs.rows_N).split(batch.prefixes.lengths), strict=True
        )
        logprobs.append([_in_shape_of(datum.inputs["target_tokens"], logprobs_TK) for datum, logprobs_TK in by_datum])
    return logprobs


def _take(items: Sequence[T], indices: Sequence[int]) -> list[T]:
    return [items[index] for index in indices]


def _selected(rows: Tensor, indices: np.ndarray | None) -> Tensor:
    return rows if indices is None else rows.index_select(0, to_device(indices, rows.device))


def _in_shape_of(target: np.ndarray, logprobs_TK: Tensor) -> Tensor:
    return logprobs_TK[:, 0] if target.ndim == 1 else logprobs_TK[:, : target.shape[1]]


def _distinct(
    rows_N: np.ndarray, targets_NK: np.ndarray, needed_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Equal rows with equal targets go through the head once: (rows M, index of each N, targets, needed)."""
    pairs, index_N = np.unique(np.column_stack([rows_N, targets_NK]), axis=0, return_inverse=True)
    index_N = index_N.reshape(-1)
    needed_M = np.zeros(len(pairs), dtype=bool)
    np.logical_or.at(needed_M, index_N, needed_N)
    return np.ascontiguousarray(pairs[:, 0]), index_N, np.ascontiguousarray(pairs[:, 1:]), needed_M


def _widened(target: np.ndarray, columns: int) -> np.ndarray:
    """(T, columns), int64; added columns are token 0, computed and never read."""
    target_TK = target.reshape(len(target), -1).astype(np.int64)
    return np.pad(target_TK, ((0, 0), (0, columns - target_TK.shape[1])))


def _not_finite(index: int, loss: Loss, value: float, logprobs: Tensor) -> UserError:
    if not bool(torch.isfinite(logprobs).all()):
        return UserError(
            f"datum {index}: the model's log-probabilities are not finite: the adapter's weights have grown too large; "
            "nothing was changed. Load an earlier state and lower learning_rate"
        )
    return UserError(
        f"datum {index}: the loss {loss.name} is {value}; nothing was changed. The model's log-probabilities "
        "are finite, so look for huge weights or advantages, or for `logprobs` far below the model's own: "
        "the ratio is exp of the difference"
    )
