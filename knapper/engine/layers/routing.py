"""Rows to experts and back: which experts a row takes, with which weights, and the rows sorted by expert.

A row's bits depend on its own numbers: probabilities are of a row alone, and its experts' outputs are added in an order
that only it decides. N rows, E experts, K experts of a row, S slots: a row and one of its experts; H hidden size.
Source: arXiv 1701.06538, section 2.1, with the softmax over all experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from knapper.engine.layers import elementwise
from knapper.engine.models.mlp import Groups, Routing


def routed(logits_NE: Tensor, routing: Routing, correction_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights (N, K) in float32, differentiable in the logits, and the experts that they are of, int64 (N, K)."""
    if routing.groups is not None:
        assert correction_E is not None
        weights_NK, experts_NK = _by_groups(
            elementwise.sigmoid(logits_NE.float()), correction_E, routing, routing.groups
        )
    else:
        weights_NK, experts_NK = _by_softmax(logits_NE, routing)
    return (weights_NK if routing.scale == 1.0 else weights_NK * routing.scale), experts_NK


def _by_softmax(logits_NE: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    if routing.biased:  # gpt-oss chooses by the logits themselves, two of which may have one probability
        chosen_NK, experts_NK = logits_NE.float().topk(routing.active)
        return chosen_NK.softmax(-1), experts_NK
    probabilities_NE = logits_NE.float().softmax(-1)
    chosen_NK, experts_NK = probabilities_NE.topk(routing.active)
    if not routing.renormalised:
        return chosen_NK, experts_NK
    # The same as dividing the chosen ones by their sum, whose gradient would be a sum over the row.
    return logits_NE.float().gather(1, experts_NK).softmax(-1), experts_NK


def _by_groups(scores_NE: Tensor, correction_E: Tensor, routing: Routing, groups: Groups) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        choice_NGE = (scores_NE + correction_E).unflatten(1, (groups.count, -1))
        best_NG2 = choice_NGE.topk(2, dim=-1).values
        chosen = (best_NG2[:, :, 0] + best_NG2[:, :, 1]).topk(groups.active).indices
        others_NG = torch.ones_like(best_NG2[:, :, 0], dtype=torch.bool).scatter_(1, chosen, value=False)
        experts_NK = choice_NGE.masked_fill(others_NG[:, :, None], -torch.inf).flatten(1).topk(routing.active).indices
    weights_NK = scores_NE.gather(1, experts_NK)
    if not routing.renormalised:
        return weights_NK, experts_NK
    columns = weights_NK.unbind(1)
    total = _sum(columns) + routing.floor
    return torch.stack([column / total for column in columns], dim=1), experts_NK


@dataclass(frozen=True)
class ExpertSpan:
    """Slots [start, stop): rows of one expert and of one adapter, by its place in the pass's; None: the base model."""

    expert: int
    adapter: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Dispatch:
    """Slots sorted by expert, those of an expert by adapter, those of both by row.

    `order_S`: a slot's place in the choice (N, K), flat; `keys_S`: expert and adapter of it as one number.
    """

    experts: int
    adapters: int
    active: int
    order_S: Tensor
    keys_S: Tensor

    @classmethod
    def of(cls, experts_NK: Tensor, experts: int, numbers_N: Tensor, adapters: int) -> "Dispatch":
        """`numbers_N`: each row's adapter, `adapters` for the base model."""
        keys_S, order_S = (experts_NK * (adapters + 1) + numbers_N[:, None]).flatten().sort(stable=True)
        return cls(experts, adapters, experts_NK.shape[1], order_S, keys_S)

    @cached_property
    def experts_S(self) -> Tensor:
        """Each slot's expert."""
        return self.keys_S // (self.adapters + 1)

    @cached_property
    def places_S(self) -> Tensor:
        """Of each place in the choice, flat, its slot: the inverse of `order_S`."""
        slots_S = torch.arange(len(self.order_S), device=self.order_S.device)
        return torch.empty_like(slots_S).scatter_(0, self.order_S, slots_S)

    @cached_property
    def spans(self) -> tuple[ExpertSpan, ...]:
        """Those with rows, in the slots' order. This waits for the device."""
        groups, counts = self.keys_S.unique_consecutive(return_counts=True)
        stops = counts.cumsum(0)
        found: list[ExpertSpan] = []
        for key, count, stop in zip(groups.tolist(), counts.tolist(), stops.tolist(), strict=True):
            expert, place = divmod(key, self.adapters + 1)
            found.append(ExpertSpan(expert, None if place == self.adapters else place, stop - count, stop))
        return tuple(found)

    @cached_property
    def expert_spans(self) -> tuple[ExpertSpan, ...]:
        """The slots of each expert that has any, whatever their adapters."""
        found: list[ExpertSpan] = []
        for span in self.spans:
            start = found.pop().start if found and found[-1].expert == span.expert else span.start
            found.append(ExpertSpan(span.expert, None, start, span.stop))
        return tuple(found)

    def ends(self, width: int) -> Tensor:
        """The last slot's place, plus one, of each `width` keys from 0 on, as grouped products take them: int32."""
        keys = self.experts * (self.adapters + 1)
        firsts = torch.arange(width, keys + 1, width, device=self.keys_S.device)
        return torch.searchsorted(self.keys_S, firsts).to(torch.int32)


def spread(x_NH: Tensor, dispatch: Dispatch) -> Tensor:
    """Each slot's row (S, H)."""
    x_SH = _Spread.apply(x_NH, dispatch)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(x_SH, Tensor)
    return x_SH


def combined(y_SH: Tensor, weights_NK: Tensor, dispatch: Dispatch) -> Tensor:
    """Each row's sum of its experts' outputs (N, H), weighted: in float32, rounded once."""
    y_XH = _Collected.apply(y_SH, dispatch)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(y_XH, Tensor)
    y_NKH = y_XH.view(*weights_NK.shape, -1)
    return _sum((y_NKH * weights_NK[:, :, None]).unbind(1)).to(y_SH.dtype)


class _Spread(torch.autograd.Function):
    """index_select, whose own gradient adds a row's parts in an order of the kernel's."""

    @staticmethod
    def forward(ctx: Any, x_NH: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return x_NH.index_select(0, dispatch.order_S // dispatch.active)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dispatch: Dispatch = ctx.dispatch
        parts = grads[0].index_select(0, dispatch.places_S).view(-1, dispatch.active, grads[0].shape[1]).unbind(1)
        return _sum(parts), None


class _Collected(torch.autograd.Function):
    """The slots in the choice's order; its gradient goes back the same way, adding nothing."""

    @staticmethod
    def forward(ctx: Any, y_SH: Tensor, dispatch: Dispatch) -> Tensor:
        ctx.dispatch = dispatch
        return y_SH.index_select(0, dispatch.places_S)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.dispatch.order_S), None


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """One after another: a kernel's order of additions may change with the number of rows."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
