"""forward_backward requests under way, and one pass of the model over pieces of several of them.

A request is cut into micro-batches, by itself alone; a pass computes micro-batches of any runs together, and gives each
the bits that it has alone: rows are computed row by row whatever their number, an adapter's gradient comes from its own
rows only, and the head and the loss are each request's own.

N rows of all sequences, U rows that are computed (`Prefixes`), M different (row, targets) of the head, K targets.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from knapper.engine.config import HEAD
from knapper.engine.device import Task
from knapper.engine.head import HeadLora
from knapper.engine.lora import Lora
from knapper.engine.losses import Loss
from knapper.engine.model import Model
from knapper.engine.prefixes import Prefixes
from knapper.engine.stretches import Course
from knapper.errors import UserError
from knapper.wire.types import Datum, ForwardBackwardOutput

_ATTENDED_TIMES = 4  # sequences of a micro-batch have at most so many times the rows that are computed of it


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
class Pass:
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


def compute(model: Model, passes: Sequence[Pass]) -> Task[None]:
    """The next micro-batch of each, in one forward and backward. All of them differentiate, or none does.

    Yields after every layer, forward and backward, and after every request's head. A pass whose loss is not finite has
    `failed` afterwards; the others do not notice.
    """
    batches = [one.waiting.popleft() for one in passes]
    course = Course(differentiates=passes[0].differentiates)
    begin, stretches = model.stretches([batch.prefixes for batch in batches], [one.lora for one in passes])
    rows_UH = yield from course.forward(begin, stretches)
    grads: list[Tensor] = []
    for one, batch, hidden_UH in zip(passes, batches, rows_UH.split([batch.rows for batch in batches]), strict=True):
        grads.append(_head(model, one, batch, hidden_UH))
        yield
    yield from course.backward(torch.cat(grads))


def _head(model: Model, one: Pass, batch: MicroBatch, hidden_UH: Tensor) -> Tensor:
    """The loss's gradient in the rows, zero if nothing is differentiated; that in the head's adapter is added."""
    hidden_UH = hidden_UH.detach().requires_grad_(hidden_UH.requires_grad)
    with torch.set_grad_enabled(one.differentiates):
        loss = _losses(model, one, batch, hidden_UH)
    if loss is not None and one.differentiates:
        loss.backward()
    return torch.zeros_like(hidden_UH) if hidden_UH.grad is None else hidden_UH.grad


def _losses(model: Model, one: Pass, batch: MicroBatch, hidden_UH: Tensor) -> Tensor | None:
    """The sum of the datums' losses, whose outputs and metrics are then in the pass; None when it has failed."""
    inputs = _inputs(batch.data, model.device)
    found = _logprobs(model, one, batch, hidden_UH)
    losses = [one.loss(p, given, one.config) for p, given in zip(found, inputs, strict=True)]
    values = torch.stack([value for value, _ in losses])
    for index, value in enumerate(values.detach().tolist()):  # one transfer for all
        if not math.isfinite(value):
            one.failed = _not_finite(batch.first + index, one.loss, value, found[index])
            return None
    flat = torch.cat([p.detach().flatten() for p in found]).cpu().numpy()
    places = np.cumsum([p.numel() for p in found])[:-1]
    one.outputs += [{"logprobs": part.reshape(p.shape)} for part, p in zip(np.split(flat, places), found, strict=True)]
    names = list(losses[0][1])
    for name, *column in zip(names, *_metrics(losses, names), strict=True):
        for value in column:
            one.metrics[name] = one.metrics.get(name, 0.0) + value
    return values.sum()


def _metrics(losses: Sequence[tuple[Tensor, dict[str, Tensor]]], names: Sequence[str]) -> list[list[float]]:
    """A list of values, by name, for each datum; in one transfer."""
    return torch.stack([torch.stack([metrics[name].float() for name in names]) for _, metrics in losses]).tolist()


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


def _logprobs(model: Model, one: Pass, batch: MicroBatch, hidden_UH: Tensor) -> list[Tensor]:
    """Of the targets, for each datum in the shape of its targets."""
    targets = [datum.inputs["target_tokens"] for datum in batch.data]
    columns = max(1 if target.ndim == 1 else target.shape[1] for target in targets)
    targets_NK = np.concatenate([_widened(target, columns) for target in targets])
    needed_N = np.concatenate([one.loss.needs_gradient(datum.inputs) for datum in batch.data])
    shared = batch.rows < batch.prefixes.total
    rows_M, places_N, targets_MK, needed_M = (
        _distinct(batch.prefixes.places_N, targets_NK, needed_N) if shared else (None, None, targets_NK, needed_N)
    )

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(model.device, non_blocking=True)

    head = HeadLora(one.lora.a[HEAD], one.lora.b[HEAD], one.lora.scale) if HEAD in one.lora.a else None
    hidden_MH = hidden_UH if rows_M is None else hidden_UH.index_select(0, on_device(rows_M))
    found_NK = model.target_logprobs(hidden_MH, on_device(targets_MK), head, on_device(needed_M))
    if places_N is not None:
        found_NK = found_NK.index_select(0, on_device(places_N))
    return [
        rows[:, 0] if target.ndim == 1 else rows[:, : target.shape[1]]
        for rows, target in zip(found_NK.split(batch.prefixes.lengths), targets, strict=True)
    ]


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
