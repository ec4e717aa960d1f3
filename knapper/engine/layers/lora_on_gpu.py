"""LoRA over consecutive rows on a GPU: one product for the adapters of all runs in a pass, in the base's dtype.

Products are of 16-bit numbers and add up in float32 inside the kernel; weights and their gradients stay float32. On a
CPU `lora_grouped` computes the same in float32, with bits that do not depend on the company. N rows, M rows of a batch,
G adapters, I inputs, O outputs, R rank, P parts of a linear.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Protocol

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.adapters import padded_rank
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.transfer import to_device

_GRAIN: Final = 8  # numbers of 16 bits: grouped products want rows of whole 16 bytes
_NEARNESS: Final = 0.02  # of bfloat16, relative to the largest result

log = structlog.get_logger()


class Span(Protocol):
    """An adapter on one linear: its rows, the parts that it adapts, its matrices for products."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def parts(self) -> tuple[int, ...]: ...
    @property
    def a(self) -> Sequence[Tensor]: ...
    @property
    def b(self) -> Sequence[Tensor]: ...
    @property
    def scale(self) -> float: ...


@dataclass(frozen=True)
class Batch:
    """Rows [start, stop) of adapters of the same parts. `a` (G, P R, I), `b`: of each part (G, O, R), with the scale.

    `ends` int32 (G): where each adapter's rows end; None with one adapter.
    """

    spans: Sequence[Span]
    rank: int
    a: Tensor
    b: Sequence[Tensor]
    ends: Tensor | None

    def of(self, x_N: Tensor) -> Tensor:
        return x_N[self.spans[0].start : self.spans[-1].stop]

    def part(self, low_MR: Tensor, index: int) -> Tensor:
        return low_MR[:, index * self.rank : (index + 1) * self.rank]


class AdaptedOnGpu(torch.autograd.Function):
    """A linear with all adapters on it. The matrices, float32: of each span all A, then all B. As `lora_grouped`'s."""

    @staticmethod
    def forward(
        ctx: Any, linear: FrozenLinear, spans: Sequence[Span], x_NI: Tensor, *_matrices: Tensor
    ) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = linear(x_NI).split(linear.widths, dim=1)
        batches = _batches(spans, x_NI)
        lows: list[Tensor] = []
        for batch in batches:
            low_MR = rows(batch.of(x_NI), batch.a.transpose(1, 2), batch.ends)
            for index, (part, b_GOR) in enumerate(zip(batch.spans[0].parts, batch.b, strict=True)):
                _add_rows(batch.of(parts[part]), batch.part(low_MR, index), b_GOR.transpose(1, 2), batch.ends)
            lows.append(low_MR)
        ctx.linear, ctx.spans = (
            linear,
            spans,
        )  # stacked again when it is needed: the copies of all layers are a second adapter
        ctx.save_for_backward(x_NI, *lows)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, *lows = ctx.saved_tensors
        grad_NI = ctx.linear.back(grads) if ctx.needs_input_grad[2] else None
        matrix_grads: list[Tensor] = []
        for batch, low_MR in zip(_batches(ctx.spans, x_NI), lows, strict=True):
            part_grads = [batch.of(grads[part]).contiguous() for part in batch.spans[0].parts]
            grad_low_MR = _joined([rows(grad, b, batch.ends) for grad, b in zip(part_grads, batch.b, strict=True)])
            grad_a = sums(grad_low_MR, batch.of(x_NI), batch.ends)  # (G, P R, I)
            grad_b = [sums(g, batch.part(low_MR, n), batch.ends) for n, g in enumerate(part_grads)]  # (G, O, R)
            for group, span in enumerate(batch.spans):
                ranks = [len(a_RI) for a_RI in span.a]
                matrix_grads += [grad_a[group, n * batch.rank :][:rank] for n, rank in enumerate(ranks)]
                matrix_grads += [
                    _scaled(grad[group, :, :rank], span.scale) for grad, rank in zip(grad_b, ranks, strict=True)
                ]
            if grad_NI is not None:
                _add_rows(batch.of(grad_NI), grad_low_MR, batch.a, batch.ends)
        return None, None, grad_NI, *matrix_grads


def rows(x_MI: Tensor, w_GIO: Tensor, ends: Tensor | None) -> Tensor:
    """(M, O): each row times the matrix of its adapter."""
    return x_MI @ w_GIO[0] if ends is None else F.grouped_mm(x_MI, w_GIO, offs=ends)


def sums(g_MO: Tensor, x_MI: Tensor, ends: Tensor | None) -> Tensor:
    """float32 (G, O, I): of each adapter the products of its own rows, summed."""
    if ends is not None:
        return F.grouped_mm(g_MO.T, x_MI, offs=ends).float()
    return wide_product(g_MO.T, x_MI)[None]


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of numbers of 16 bits; where no kernel gives that, it is rounded to them first."""
    if a.device.type in ("cuda", "meta") and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def rows_reference(x_MI: Tensor, w_GIO: Tensor, ends: Tensor) -> Tensor:
    """What `rows` is compared with: an adapter after the other, in float32."""
    return torch.cat([x.float() @ w.float() for x, w in zip(_split(x_MI, ends), w_GIO, strict=True)]).to(x_MI.dtype)


def sums_reference(g_MO: Tensor, x_MI: Tensor, ends: Tensor) -> Tensor:
    """What `sums` is compared with."""
    return torch.stack(
        [g.float().T @ x.float() for g, x in zip(_split(g_MO, ends), _split(x_MI, ends), strict=True)]
    )  # fmt: skip


def _split(x_M: Tensor, ends: Tensor) -> Sequence[Tensor]:
    stops = ends.tolist()
    parts: Sequence[Tensor] = x_M.split([stop - start for start, stop in zip([0, *stops], stops, strict=False)])
    return parts


def _batches(spans: Sequence[Span], x_NI: Tensor) -> list[Batch]:
    """All spans as one batch where one product can compute them, else each by itself."""
    if not spans:
        return []
    whole_lines = all(size % _GRAIN == 0 for span in spans for size in (span.a[0].shape[1], *map(len, span.b)))
    alike = all(span.parts == spans[0].parts for span in spans)
    dense = all(before.stop == after.start for before, after in itertools.pairwise(spans))
    if len(spans) > 1 and alike and dense and whole_lines and x_NI.dtype == torch.bfloat16 and groups(x_NI.device):
        ends = to_device([span.stop - spans[0].start for span in spans], x_NI.device, torch.int32)
        return [_batch(spans, x_NI.dtype, ends)]
    return [_batch([span], x_NI.dtype, None) for span in spans]


def _batch(spans: Sequence[Span], dtype: torch.dtype, ends: Tensor | None) -> Batch:
    rank = max(padded_rank(len(a_RI)) for span in spans for a_RI in span.a)
    a = _stacked([_joined([_filled(a_RI.to(dtype), rank, 0) for a_RI in span.a], dim=0) for span in spans])
    b = [
        _stacked([_scaled(_filled(span.b[part].to(dtype), rank, 1), span.scale) for span in spans])
        for part in range(len(spans[0].parts))
    ]
    return Batch(spans, rank, a, b, ends)


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    return matrices[0][None] if len(matrices) == 1 else torch.stack(list(matrices))


def _filled(matrix: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - matrix.shape[dim]
    return matrix if missing == 0 else F.pad(matrix, (0, 0) * (1 - dim) + (0, missing))


def _scaled(matrix: Tensor, scale: float) -> Tensor:
    return matrix if scale == 1.0 else matrix * scale


def _joined(matrices: Sequence[Tensor], dim: int = 1) -> Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), dim=dim)


def _add_rows(y_MO: Tensor, x_MI: Tensor, w_GIO: Tensor, ends: Tensor | None) -> None:
    """y += `rows`; with one adapter in one kernel, which rounds once."""
    if ends is None:
        y_MO.addmm_(x_MI, w_GIO[0])
    else:
        y_MO.add_(rows(x_MI, w_GIO, ends))


@cache
def groups(device: torch.device) -> bool:
    """Whether the device has grouped products that give the right numbers; tried once, on a GPU."""
    if device.type != "cuda":
        return device.type in ("cpu", "meta")
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False  # torch computes them one after another there, and waits for the device to learn their sizes
    try:
        right = _is_right(device)
    except RuntimeError as error:
        log.warning("adapters are computed one after another: torch's grouped products fail here", reason=str(error))
        return False
    if not right:
        log.warning("adapters are computed one after another: torch's grouped products are wrong here")
    return right


def _is_right(device: torch.device) -> bool:
    """Groups of any size, an empty one too."""
    generator = torch.Generator().manual_seed(0)
    x_MI, g_MO, w_GIO = (
        torch.randn(shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((83, 64), (83, 48), (4, 64, 48))
    )
    ends = torch.tensor([7, 7, 50, 83], dtype=torch.int32, device=device)
    pairs = [
        (rows(x_MI, w_GIO, ends), rows_reference(x_MI, w_GIO, ends)),
        (sums(g_MO, x_MI, ends), sums_reference(g_MO, x_MI, ends)),
        (rows(g_MO, w_GIO.transpose(1, 2), ends), rows_reference(g_MO, w_GIO.transpose(1, 2), ends)),
    ]
    return all(bool((found - true).abs().max() <= _NEARNESS * true.abs().max()) for found, true in pairs)
