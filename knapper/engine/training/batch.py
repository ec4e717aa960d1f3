"""forward_backward requests under way, and one pass of the model over pieces of several of them.

A request is cut into micro-batches, by itself alone; a pass computes micro-batches of any runs together, and gives each
the bits that it has alone: rows are computed row by row whatever their number, an adapter's gradient comes from its own
rows only, and the loss is each request's own.

N rows of all sequences, U rows that are computed (`Prefixes`), M different (row, targets) of the head, K targets.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from knapper.engine.executor import Work
from knapper.engine.layers.head import HeadLora
from knapper.engine.layers.layerwise import LayerwisePass
from knapper.engine.layers.lora import Lora
from knapper.engine.models.base import Model
from knapper.engine.models.config import HEAD
from knapper.engine.training.losses import Loss, LossValue
from knapper.engine.training.prefix_sharing import Prefixes
from knapper.errors import UserError
from knapper.wire.types import Datum, ForwardBackwardOutput

T = TypeVar("T")

_ATTENDED_TIMES = 4  # sequences of a micro-batch have at most so many times the rows that are computed of it

_HEAD_ROWS = 128  # of several requests in one product: it is saturated, and others wait for one such product at most


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
    """One request, as far as it got. With `sums_P`, gradients are added there; None: forward only.

    `failed` ends it: what it would have changed is left alone.
    """

    lora: Lora
    loss: Loss
    config: dict[str, float]
    sums_P: Tensor | None
    waiting: deque[MicroBatch]
    outputs: list[dict[str, np.ndarray]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    failed: UserError | None = None

    @property
    def differentiates(self) -> bool:
        return self.sums_P is not None

    @property
    def done(self) -> bool:
        return not self.waiting or self.failed is not None

    def output(self) -> ForwardBackwardOutput:
        """Raises what it failed with."""
        if self.failed is not None:
            raise self.failed
        return ForwardBackwardOutput(self.outputs, self.metrics)


def micro_batches(data: Sequence[Datum], rows_max: int) -> Iterator[MicroBatch]:
    """In order, cut between datums: each has at most `rows_max` rows to compute, or is one datum."""
    first, prefixes = 0, Prefixes()
    for index, datum in enumerate(data):
        rows = len(prefixes) + prefixes.new_rows(datum.tokens)
        if index > first and (rows > rows_max or prefixes.total + len(datum.tokens) > _ATTENDED_TIMES * rows_max):
            yield MicroBatch(first, data[first:index], prefixes)
            first, prefixes = index, Prefixes()
        prefixes.add(datum.tokens)
    yield MicroBatch(first, data[first:], prefixes)


def compute(model: Model, passes: Sequence[PendingRequest]) -> Work[None]:
    """The next micro-batch of each, in one forward and backward. All of them differentiate, or none does.

    Yields after every layer, forward and backward, and after the head of some requests. A pass whose loss is not finite
    has `failed` afterwards; the others do not notice.
    """
    batches = [one.waiting.popleft() for one in passes]
    course = LayerwisePass(differentiates=passes[0].differentiates)
    begin, stretches = model.stretches([batch.prefixes for batch in batches], [one.lora for one in passes])
    rows_UH = yield from course.forward(begin, stretches)
    asked = [_Asked.of(one.loss, batch) for one, batch in zip(passes, batches, strict=True)]
    grads = list(rows_UH.split([batch.rows for batch in batches]))
    for some in _headed(passes, asked):
        found = _head(model, _at(passes, some), _at(batches, some), _at(asked, some), _at(grads, some))
        for index, grad in zip(some, found, strict=True):
            grads[index] = grad
        yield
    yield from course.backward(torch.cat(grads))


def _head(
    model: Model,
    passes: Sequence[PendingRequest],
    batches: Sequence[MicroBatch],
    asked: Sequence["_Asked"],
    hidden: Sequence[Tensor],
) -> list[Tensor]:
    """The losses' gradient in each one's rows, zero if nothing is differentiated; that in a head's adapter is added."""
    leaves = [rows_UH.detach().requires_grad_(rows_UH.requires_grad) for rows_UH in hidden]
    with torch.set_grad_enabled(passes[0].differentiates):
        found = _logprobs(model, passes, batches, asked, leaves)
        losses = [_losses(model, *each) for each in zip(passes, batches, found, strict=True)]
    sums = [loss for loss in losses if loss is not None]
    if sums and passes[0].differentiates:
        torch.stack(sums).sum().backward()
    return [  # of one that failed it may be 0 * NaN
        torch.zeros_like(rows_UH) if one.failed is not None or rows_UH.grad is None else rows_UH.grad
        for one, rows_UH in zip(passes, leaves, strict=True)
    ]


def _losses(model: Model, one: PendingRequest, batch: MicroBatch, found: Sequence[Tensor]) -> Tensor | None:
    """The sum of the datums' losses, whose outputs and metrics are then in the pass; None when it has failed.

    `found`: the targets' log-probabilities, by datum.
    """
    inputs = _inputs(batch.data, model.device)
    losses = [one.loss(p, given, one.config) for p, given in zip(found, inputs, strict=True)]
    values = torch.stack([loss.total for loss in losses])
    for index, value in enumerate(values.detach().tolist()):  # one transfer for all
        if not math.isfinite(value):
            one.failed = _not_finite(batch.first + index, one.loss, value, found[index])
            return None
    told = {"logprobs": [p.detach() for p in found]}
    if one.loss.terms_told:
        told["elementwise_loss"] = [loss.terms for loss in losses]
    one.outputs += [dict(zip(told, arrays, strict=True)) for arrays in zip(*map(_arrays, told.values()), strict=True)]
    names = list(losses[0].metrics)
    for name, *column in zip(names, *_metrics(losses, names), strict=True):
        for value in column:
            one.metrics[name] = one.metrics.get(name, 0.0) + value
    return values.sum()


def _arrays(by_datum: Sequence[Tensor]) -> list[np.ndarray]:
    """Each in its shape; in one transfer."""
    flat = torch.cat([each.flatten() for each in by_datum]).cpu().numpy()
    parts = np.split(flat, np.cumsum([each.numel() for each in by_datum])[:-1])
    return [part.reshape(each.shape) for part, each in zip(parts, by_datum, strict=True)]


def _metrics(losses: Sequence[LossValue], names: Sequence[str]) -> list[list[float]]:
    """A list of values, by name, for each datum; in one transfer."""
    return torch.stack([torch.stack([loss.metrics[name].float() for name in names]) for loss in losses]).tolist()


def _inputs(data: Sequence[Datum], device: torch.device) -> list[dict[str, Tensor]]:
    """What the loss is given of each datum, its targets aside; one transfer a name."""
    given: list[dict[str, Tensor]] = [{} for _ in data]
    for name in dict.fromkeys(name for datum in data for name in datum.inputs if name != "target_tokens"):
        having = [index for index, datum in enumerate(data) if name in datum.inputs]
        arrays = [data[index].inputs[name] for index in having]
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device, non_blocking=True)
        for index, array, part in zip(having, arrays, flat.split([array.size for array in arrays]), strict=True):
            given[index][name] = part.view(array.shape)
    return given


@dataclass(frozen=True)
class _Asked:
    """What a micro-batch wants of the head. Without `rows_M` and `places_N`: all rows, in order."""

    rows_M: np.ndarray | None
    places_N: np.ndarray | None
    targets_MK: np.ndarray
    needed_M: np.ndarray

    @classmethod
    def of(cls, loss: Loss, batch: MicroBatch) -> "_Asked":
        targets = [datum.inputs["target_tokens"] for datum in batch.data]
        columns = max(1 if target.ndim == 1 else target.shape[1] for target in targets)
        targets_NK = np.concatenate([_widened(target, columns) for target in targets])
        needed_N = np.concatenate([loss.needs_gradient(datum.inputs) for datum in batch.data])
        if batch.rows == batch.prefixes.total:
            return cls(None, None, targets_NK, needed_N)
        rows_M, places_N, targets_MK, needed_M = _distinct(batch.prefixes.places_N, targets_NK, needed_N)
        return cls(rows_M, places_N, targets_MK, needed_M)


def _headed(passes: Sequence[PendingRequest], asked: Sequence[_Asked]) -> list[list[int]]:
    """Who goes through the head together: a row's bits are its own there too.

    A head with an adapter goes by itself, and so do other numbers of targets, which are added up in another order.
    """
    open_: dict[int, list[int]] = {}  # by number of targets, those that may become more
    rows: dict[int, int] = {}
    found: list[list[int]] = []
    for index, (one, mine) in enumerate(zip(passes, asked, strict=True)):
        own, columns = mine.targets_MK.shape
        if HEAD in one.lora.a:
            found.append([index])
        elif columns in open_ and rows[columns] + own <= _HEAD_ROWS:
            open_[columns].append(index)
            rows[columns] += own
        else:
            open_[columns], rows[columns] = [index], own
            found.append(open_[columns])
    return found


def _logprobs(
    model: Model,
    passes: Sequence[PendingRequest],
    batches: Sequence[MicroBatch],
    asked: Sequence[_Asked],
    hidden: Sequence[Tensor],
) -> list[list[Tensor]]:
    """Of the targets, by request and datum in the shape of its targets. A head's adapter is of one request alone."""
    lora = passes[0].lora
    logprobs_MK = model.target_logprobs(
        torch.cat([_selected(rows_UH, mine.rows_M) for rows_UH, mine in zip(hidden, asked, strict=True)]),
        _on(model.device, np.concatenate([mine.targets_MK for mine in asked])),
        HeadLora(lora.a[HEAD], lora.b[HEAD], lora.scale) if HEAD in lora.a else None,
        np.concatenate([mine.needed_M for mine in asked]),
    )
    found: list[list[Tensor]] = []
    parts = logprobs_MK.split([len(mine.needed_M) for mine in asked])
    for mine, batch, own_MK in zip(asked, batches, parts, strict=True):
        by_datum = zip(batch.data, _selected(own_MK, mine.places_N).split(batch.prefixes.lengths), strict=True)
        found.append([_as(one.inputs["target_tokens"], found_TK) for one, found_TK in by_datum])
    return found


def _at(these: Sequence[T], places: Sequence[int]) -> list[T]:
    return [these[place] for place in places]


def _selected(rows: Tensor, which: np.ndarray | None) -> Tensor:
    return rows if which is None else rows.index_select(0, _on(rows.device, which))


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _as(target: np.ndarray, found_TK: Tensor) -> Tensor:
    return found_TK[:, 0] if target.ndim == 1 else found_TK[:, : target.shape[1]]


def _distinct(
    places_N: np.ndarray, targets_NK: np.ndarray, needed_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows that are one and want the same targets cost the head once: (rows M, place of each N, targets, needed)."""
    pairs, places = np.unique(np.column_stack([places_N, targets_NK]), axis=0, return_inverse=True)
    places = places.reshape(-1)
    needed_M = np.zeros(len(pairs), dtype=bool)
    np.logical_or.at(needed_M, places, needed_N)
    return np.ascontiguousarray(pairs[:, 0]), places, np.ascontiguousarray(pairs[:, 1:]), needed_M


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
