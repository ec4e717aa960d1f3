"""The frozen linears of all experts, with a pair of A and B for each expert of each adapter.

`by_loop` computes expert by expert and adapter by adapter, with the row layouts of any other linear, so that on a CPU a
row has the bits that it has alone. `by_groups` asks for one product of all experts, and one of all pairs, of a device
that has such kernels; it waits for nothing that the device knows. Both differentiate.

S slots sorted by expert and adapter (`Dispatch`), E experts, G groups, an expert and an adapter each, I inputs, O
outputs, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.adapters import padded_rank
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import AdaptedRows
from knapper.engine.layers.routing import Dispatch


class ExpertLinears:
    """W (E, O, I), of each expert `parts` stacked, frozen; computed in `dtype`. `each`: without grouped products a
    linear for each expert; with them `w_EOI` is all. `bias_EO`: in `dtype`, where experts have one.
    """

    def __init__(
        self,
        experts: Sequence[Sequence[Tensor]],
        dtype: torch.dtype,
        exactness: Exactness,
        joined_EOI: Tensor | None = None,
        bias_EO: Tensor | None = None,
        linear: type[FrozenLinear] = FrozenLinear,
    ) -> None:
        """`experts`: the parts of each. `joined_EOI`: of which they are views. `linear`: the kind of each one's."""
        self.dtype, self.exactness = dtype, exactness
        self.widths = tuple(len(part) for part in experts[0])
        self.outputs, self.inputs = sum(self.widths), experts[0][0].shape[1]
        self.grouped = has_grouped_products(experts[0][0].device, dtype)
        self._experts, self.bias_EO = len(experts), bias_EO
        self.each: tuple[FrozenLinear, ...] = ()
        if self.grouped:
            self.w_EOI = _stacked(experts, dtype) if joined_EOI is None else joined_EOI.to(dtype)
        else:  # at once: adapters are probed on all that they may enter
            self.each = tuple(linear(parts, dtype, exactness=exactness) for parts in experts)

    def biased(self, y_SO: Tensor, dispatch: Dispatch) -> Tensor:
        """With each slot's bias, where experts have one: added by itself, as kernels of few rows add it elsewhere."""
        return y_SO if self.bias_EO is None else y_SO + self.bias_EO.index_select(0, dispatch.experts_S)

    @property
    def nbytes(self) -> int:
        """Bytes of W, once, in `dtype`."""
        return self._experts * self.outputs * self.inputs * self.dtype.itemsize


def _stacked(experts: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.cat(list(parts)).to(dtype) for parts in experts])


def has_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """In 16 bits only, as torch says it for all but a CPU."""
    return device.type in ("cuda", "meta") and dtype == torch.bfloat16


def adapted(
    names: Sequence[str], x_SI: Tensor, linears: ExpertLinears, dispatch: Dispatch, loras: Sequence[Lora]
) -> tuple[Tensor, ...]:
    """The slots' rows through their experts' linears, each with its adapter's pair: (S, width) for each of `names`."""
    compute = by_groups if linears.grouped else by_loop
    return compute(names, x_SI, linears, dispatch, loras)


def by_loop(
    names: Sequence[str], x_SI: Tensor, linears: ExpertLinears, dispatch: Dispatch, loras: Sequence[Lora]
) -> tuple[Tensor, ...]:
    """The reference of `adapted`."""
    parts_of = [tuple(part for part, name in enumerate(names) if name in lora.a) for lora in loras]
    matrices: list[Tensor] = []
    places: list[range] = []
    for lora, parts in zip(loras, parts_of, strict=True):
        places.append(range(len(matrices), len(matrices) + 2 * len(parts)))
        matrices += [side[names[part]] for side in (lora.a, lora.b) for part in parts]
    spans = [
        _PairRows(
            span.expert,
            places[span.adapter],
            AdaptedRows(span.start, span.stop, parts_of[span.adapter], loras[span.adapter].scale),
        )
        for span in dispatch.spans
        if span.adapter is not None and parts_of[span.adapter]
    ]
    outputs = _Looped.apply(linears, dispatch, spans, x_SI, *matrices)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(outputs, tuple)
    return outputs


def by_groups(
    names: Sequence[str], x_SI: Tensor, linears: ExpertLinears, dispatch: Dispatch, loras: Sequence[Lora]
) -> tuple[Tensor, ...]:
    """`adapted` by grouped products. The adapters' are in the base's dtype, as the kernels are."""
    y_SO = linears.biased(_grouped(x_SI, linears.w_EOI, dispatch.ends(dispatch.adapters + 1)), dispatch)
    outputs = list(y_SO.split(linears.widths, dim=1))
    if any(name in lora.a for lora in loras for name in names):
        ends_G = dispatch.ends(1)
        for part, (name, width) in enumerate(zip(names, linears.widths, strict=True)):
            pairs = _pairs(name, linears, loras, width, x_SI)
            if pairs is not None:
                a_GRI, b_GOR = pairs
                outputs[part] = outputs[part] + _grouped(_grouped(x_SI, a_GRI, ends_G), b_GOR, ends_G)
    return tuple(outputs)


def _grouped(x_SI: Tensor, w_GOI: Tensor, ends_G: Tensor) -> Tensor:
    """Slots up to each group's end times its matrix: (S, O)."""
    y_SO: Tensor = F.grouped_mm(x_SI, w_GOI.transpose(1, 2), offs=ends_G)
    return y_SO


def _pairs(
    name: str, linears: ExpertLinears, loras: Sequence[Lora], width: int, like: Tensor
) -> tuple[Tensor, Tensor] | None:
    """A, and B with the adapter's scale, of every expert and adapter; zeros for the base model. None without any."""
    having = [lora for lora in loras if name in lora.a]
    if not having:
        return None
    rank = max(padded_rank(lora.a[name].shape[1]) for lora in having)
    experts = len(having[0].a[name])
    none = like.new_zeros(experts, rank, linears.inputs), like.new_zeros(experts, width, rank)
    pairs = [
        (_padded(lora.a[name], 1, rank).to(like.dtype), (_padded(lora.b[name], 2, rank) * lora.scale).to(like.dtype))
        if name in lora.a
        else none
        for lora in loras
    ]
    a, b = zip(*pairs, none, strict=True)
    return torch.stack(a, dim=1).flatten(0, 1), torch.stack(b, dim=1).flatten(0, 1)


def _padded(matrix: Tensor, dim: int, rank: int) -> Tensor:
    missing = rank - matrix.shape[dim]
    return F.pad(matrix, (0, 0) * (2 - dim) + (0, missing)) if missing else matrix


@dataclass(frozen=True)
class _PairRows:
    """The rows of an expert and an adapter. `places`: of the adapter's A, then of its B, among all matrices."""

    expert: int
    places: range
    rows: AdaptedRows

    def pair(self, matrices: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The expert's A and B."""
        own = [matrices[place][self.expert] for place in self.places]
        return own[: len(own) // 2], own[len(own) // 2 :]


class _Looped(torch.autograd.Function):
    """The matrices: of each adapter all A, then all B; each of all experts."""

    @staticmethod
    def forward(
        ctx: Any,
        linears: ExpertLinears,
        dispatch: Dispatch,
        spans: Sequence[_PairRows],
        x_SI: Tensor,
        *matrices: Tensor,
    ) -> tuple[Tensor, ...]:
        each = [linears.each[one.expert](x_SI[one.start : one.stop]) for one in dispatch.expert_spans]
        y_SO = linears.biased(torch.cat(each), dispatch)
        outputs: tuple[Tensor, ...] = y_SO.split(linears.widths, dim=1)
        lows = [span.rows.add(outputs, x_SI, *span.pair(matrices), linears.exactness) for span in spans]
        ctx.linears, ctx.dispatch, ctx.spans = linears, dispatch, spans
        ctx.save_for_backward(x_SI, *lows, *matrices)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        linears: ExpertLinears = ctx.linears
        spans: Sequence[_PairRows] = ctx.spans
        x_SI, *saved = ctx.saved_tensors
        lows, matrices = saved[: len(spans)], saved[len(spans) :]
        grad_SI = None
        if ctx.needs_input_grad[3]:
            back = [
                linears.each[one.expert].back([grad[one.start : one.stop] for grad in grads])
                for one in ctx.dispatch.expert_spans
            ]
            grad_SI = torch.cat(back)
        found = [torch.zeros_like(matrix) for matrix in matrices]
        for span, low_MR in zip(spans, lows, strict=True):
            own = span.rows.gradients(grads, grad_SI, x_SI, low_MR, *span.pair(matrices))
            for place, gradient in zip(span.places, own, strict=True):
                found[place][span.expert] = gradient
        return None, None, None, grad_SI, *found
