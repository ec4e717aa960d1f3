"""LoRA over consecutive rows, differentiable in the adapters' matrices, for training and prefill.

The SGMV of multi-LoRA serving (Punica, arXiv 2310.18547). A linear and all adapters on it are one node of the graph.
Autograd would make nine for an adapter and target module: for small runs that share a pass, those cost as much as their
products. N rows, M rows of one adapter, I inputs, O outputs, R rank.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from knapper.engine.layers.adapters import for_products, pad_rank, padded_rank, product
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_on_gpu import AdaptedOnGpu
from knapper.engine.transfer import to_device


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) use `lora`; None is the base model. Rows of no segment use the base model too."""

    start: int
    stop: int
    lora: Lora | None


class Segments:
    """knapper.engine.layers.adapters.Adapt of rows sorted by adapter."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        ordered = sorted(segments, key=lambda segment: segment.start)
        for before, after in itertools.pairwise(ordered):
            assert before.stop <= after.start, (
                f"segments overlap: {before.start}..{before.stop}, {after.start}..{after.stop}"
            )
        self._adapted = [(s.start, s.stop, s.lora) for s in ordered if s.lora is not None and s.stop > s.start]
        self._numbers: Tensor | None = None

    @property
    def loras(self) -> Sequence[Lora]:
        return [lora for _, _, lora in self._adapted]

    def numbers(self, rows: int, device: torch.device) -> Tensor:
        if self._numbers is None or len(self._numbers) != rows:
            numbers = np.full(rows, len(self._adapted))
            for place, (start, stop, _) in enumerate(self._adapted):
                numbers[start:stop] = place
            self._numbers = to_device(numbers, device)
        return self._numbers

    def __call__(self, names: Sequence[str], x_NI: Tensor, linear: FrozenLinear) -> tuple[Tensor, ...]:
        spans: list[_Span] = []
        matrices: list[Tensor] = []
        for start, stop, lora in self._adapted:
            parts = tuple(part for part, name in enumerate(names) if name in lora.a)
            if parts:
                a, b = ([side[names[part]] for part in parts] for side in (lora.for_products.a, lora.for_products.b))
                spans.append(_Span(start, stop, parts, lora.scale, a, b))
                matrices += [side[names[part]] for side in (lora.a, lora.b) for part in parts]
        if not spans and not (torch.is_grad_enabled() and x_NI.requires_grad):  # a node costs as much as a few rows
            plain: tuple[Tensor, ...] = linear(x_NI).split(linear.widths, dim=1)
            return plain
        adapted = _Adapted if keeps_bits(x_NI.device) else AdaptedOnGpu
        outputs = adapted.apply(linear, spans, x_NI, *matrices)  # type: ignore[no-untyped-call]  # the library has no types here
        assert isinstance(outputs, tuple)
        return outputs


@dataclass(frozen=True)
class AdaptedRows:
    """An adapter on one linear: its rows, and the parts of the linear that it adapts."""

    start: int
    stop: int
    parts: tuple[int, ...]
    scale: float

    def of(self, x_N: Tensor) -> Tensor:
        return x_N[self.start : self.stop]

    def add(
        self, outputs: Sequence[Tensor], x_NI: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], exactness: Exactness
    ) -> Tensor:
        """Adds the adapter's part to its rows of each output; x A^T, scaled, which `gradients` takes."""
        a, b = ([for_products(matrix, x_NI) for matrix in side] for side in (a, b))
        x_MI = self.of(x_NI).to(a[0].dtype)
        layout = exactness.adapter(padded_rank(len(a[0])), a[0])
        low_MR = product(layout, x_MI, _stacked([pad_rank(a_RI, 0) for a_RI in a])) * self.scale
        for part, low, b_OR in zip(self.parts, _by_part(low_MR, a), b, strict=True):
            self.of(outputs[part]).add_(product(layout, low, pad_rank(b_OR, 1)))
        return low_MR

    def gradients(
        self,
        grads: Sequence[Tensor],
        grad_NI: Tensor | None,
        x_NI: Tensor,
        low_MR: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
    ) -> list[Tensor]:
        """Those of all A, then of all B, by the outputs' `grads`; that of the rows is added to `grad_NI`."""
        own, (a, b) = a[0].dtype, ([for_products(matrix, x_NI) for matrix in side] for side in (a, b))
        x_MI = self.of(x_NI).to(a[0].dtype)
        part_grads = [self.of(grads[part]).to(x_MI.dtype) for part in self.parts]
        grad_low_MR = _joined([grad_MO @ b_OR for grad_MO, b_OR in zip(part_grads, b, strict=True)]).mul_(self.scale)
        found = list((grad_low_MR.T @ x_MI).split([len(a_RI) for a_RI in a]))
        for grad_MO, low, a_RI in zip(part_grads, _by_part(low_MR, a), a, strict=True):
            found.append(grad_MO.T @ low[:, : len(a_RI)])
        if grad_NI is not None and grad_NI.dtype == grad_low_MR.dtype:
            self.of(grad_NI).addmm_(grad_low_MR, _stacked(a))
        elif grad_NI is not None:
            self.of(grad_NI).add_(grad_low_MR @ _stacked(a))
        return [matrix.to(own) for matrix in found]


@dataclass(frozen=True)
class _Span(AdaptedRows):
    """With its matrices for products."""

    a: Sequence[Tensor]
    b: Sequence[Tensor]


class _Adapted(torch.autograd.Function):
    """The matrices: of each span all A, then all B."""

    @staticmethod
    def forward(
        ctx: Any, linear: FrozenLinear, spans: Sequence[AdaptedRows], x_NI: Tensor, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = linear(x_NI).split(linear.widths, dim=1)
        lows = [span.add(parts, x_NI, a, b, linear.exactness) for span, a, b in _matrices_of(spans, matrices)]
        ctx.linear, ctx.spans = linear, spans
        ctx.save_for_backward(x_NI, *lows, *matrices)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linear: FrozenLinear = ctx.linear
        spans: Sequence[AdaptedRows] = ctx.spans
        x_NI, *saved = ctx.saved_tensors
        lows, matrices = saved[: len(spans)], saved[len(spans) :]
        grad_NI = linear.back(grads) if ctx.needs_input_grad[2] else None
        matrix_grads: list[Tensor] = []
        for low_MR, (span, a, b) in zip(lows, _matrices_of(spans, matrices), strict=True):
            matrix_grads += span.gradients(grads, grad_NI, x_NI, low_MR, a, b)
        return None, None, grad_NI, *matrix_grads


def _matrices_of(
    spans: Sequence[AdaptedRows], matrices: Sequence[Tensor]
) -> Iterator[tuple[AdaptedRows, Sequence[Tensor], Sequence[Tensor]]]:
    """Each span with its A and its B."""
    start = 0
    for span in spans:
        count = len(span.parts)
        yield span, matrices[start : start + count], matrices[start + count : start + 2 * count]
        start += 2 * count


def _by_part(low_MR: Tensor, a: Sequence[Tensor]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = low_MR.split([padded_rank(len(a_RI)) for a_RI in a], dim=1)
    return parts


def _stacked(a: Sequence[Tensor]) -> Tensor:
    return a[0] if len(a) == 1 else torch.cat(list(a))


def _joined(lows: Sequence[Tensor]) -> Tensor:
    return lows[0] if len(lows) == 1 else torch.cat(list(lows), dim=1)


base: Final = Segments(())
