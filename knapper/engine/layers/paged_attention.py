"""Attention of one new token a sequence, over keys and values that lie in pages.

A page holds the keys and values of `PAGE` tokens of one sequence. Products are made page by page where the pages lie:
nothing is gathered but scores, and no row meets a key of another sequence. Maxima, sums and outputs of a sequence are
put together in the order of its pages, by the operations of `batch_invariant_attention`, whose blocks the pages are: on
a CPU a token has the bits that it has in training. Where bits are not kept, one operation adds up all pages, in any
order.

N rows, P pages, B pages of the longest sequence, G key/value heads, Q queries a key/value head, D elements of a key, E
of a value, C = PAGE.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers import batch_invariant_attention
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.batch_invariant_attention import LAYOUTS, causal, product
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.models.layer import AttentionLayout, ScoreRule
from knapper.engine.transfer import to_device

PAGE: Final = batch_invariant_attention.KEYS


@dataclass(frozen=True)
class PageTable:
    """Whose pages the P pages are. `at_N`: the position of each sequence's new token, whose page is `page_N`.

    `owner_P`: rows. `start_P`: the position of a page's first key. `pages_NB`: a sequence's pages in order, P where it
    has no more. `ordered_P`: the first page of each sequence that has one, the second..., of the longest sequence
    first; `counts`: how many those are. `rank_N`: of the sequences among the longest. `in_order`: bits are kept.
    """

    at_N: Tensor
    page_N: Tensor
    owner_P: Tensor
    start_P: Tensor
    pages_NB: Tensor
    ordered_P: Tensor
    counts: Sequence[int]
    rank_N: Tensor
    in_order: bool
    _biases: dict[int | None, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, lengths: Sequence[int], pages: Sequence[Sequence[int]], device: torch.device) -> "PageTable":
        """Of sequences of `lengths` tokens before the new one. `pages` has each of range(P) once."""
        sizes = np.array([len(each) for each in pages])
        total, longest = int(sizes.sum()), int(sizes.max())
        table_NB = np.full((len(pages), longest), total)
        for row, each in enumerate(pages):
            table_NB[row, : len(each)] = each
        order_N = np.argsort(-sizes, kind="stable")
        by_block_BN = table_NB[order_N].T
        owner_P, start_P = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
        is_page_NB = table_NB < total
        rows, blocks = np.nonzero(is_page_NB)
        owner_P[table_NB[is_page_NB]], start_P[table_NB[is_page_NB]] = rows, blocks * PAGE
        parts = (
            np.array(lengths), np.array([each[length // PAGE] for each, length in zip(pages, lengths, strict=True)]),
            owner_P, start_P, table_NB, by_block_BN[by_block_BN < total], np.argsort(order_N),
        )  # fmt: skip
        on_device = to_device(np.concatenate([part.ravel() for part in parts]), device).split([p.size for p in parts])
        at_N, page_N, owner, start, table, ordered_P, rank_N = on_device
        counts = is_page_NB.sum(0).tolist()
        return cls(
            at_N, page_N, owner, start, table.view(table_NB.shape), ordered_P, counts, rank_N, keeps_bits(device)
        )

    def bias_P11C(self, window: int | None) -> Tensor:
        """-inf past the new token, and before its window; made once for all layers of a window."""
        if window not in self._biases:
            key_PC = self.start_P[:, None] + torch.arange(PAGE, device=self.start_P.device)
            at_P1 = self.at_N[self.owner_P][:, None]
            masked = key_PC > at_P1
            if window is not None:
                masked |= key_PC <= at_P1 - window
            zeros = torch.zeros(masked.shape, device=masked.device)
            self._biases[window] = zeros.masked_fill_(masked, -torch.inf)[:, None, None, :]
        return self._biases[window]

    @cached_property
    def within_N(self) -> Tensor:
        """The new token's place in its page."""
        return self.at_N % PAGE

    def store(self, pages_PGCX: Tensor, new_NGX: Tensor) -> None:
        """The new tokens' keys or values go into their pages."""
        pages_PGCX[self.page_N, :, self.within_N] = new_NGX

    def highest(self, of_pages: Tensor) -> Tensor:
        """(N, ...) from (P, ...): the maxima over a sequence's pages."""
        return self._of_sequences(of_pages, -torch.inf).amax(1)

    def summed(self, of_pages: Tensor) -> Tensor:
        """(N, ...) from (P, ...): sums over a sequence's pages, as training adds up exponentials."""
        if not self.in_order:
            return self._in_any_order(of_pages)
        parts = self._of_sequences(of_pages, 0.0).movedim(1, -1).contiguous()
        return parts[..., 0] if parts.shape[-1] == 1 else parts.cumsum(-1)[..., -1]

    def added(self, of_pages: Tensor) -> Tensor:
        """(N, ...) from (P, ...): sums over a sequence's pages, as training adds up values: one after another."""
        if not self.in_order:
            return self._in_any_order(of_pages)
        ordered = of_pages.index_select(0, self.ordered_P)
        sums, start = ordered[: self.counts[0]], self.counts[0]
        for count in self.counts[1:]:
            sums[:count] += ordered[start : start + count]
            start += count
        return sums.index_select(0, self.rank_N)

    def _of_sequences(self, of_pages: Tensor, missing: float) -> Tensor:
        """(N, B, ...) from (P, ...), `missing` where a sequence has no page."""
        return F.pad(of_pages, (*(0, 0) * (of_pages.dim() - 1), 0, 1), value=missing)[self.pages_NB]

    def _in_any_order(self, of_pages: Tensor) -> Tensor:
        sums = of_pages.new_zeros(len(self.at_N), *of_pages.shape[1:])
        return sums.index_add_(0, self.owner_P, of_pages)


def decoded(q_NGQD: Tensor, keys_PGCD: Tensor, values_PGCE: Tensor, table: PageTable, scores: ScoreRule) -> Tensor:
    """(N, G, Q, E): each sequence's new token over its own keys, those of `table`. Keys and values past a sequence's
    end are finite. Scores and sums are float32.
    """
    _, groups, queries, _ = q_NGQD.shape
    rows = queries + -queries % scores.layout.rows if table.in_order else queries  # the padding enters the GEMMs only
    q_NGMD = q_NGQD * scores.scale
    if rows > queries:
        q_NGMD = F.pad(q_NGMD, (0, 0, 0, rows - queries))
    q_XMD = q_NGMD.index_select(0, table.owner_P).flatten(0, 1)
    part = scores.layout.part if table.in_order else 0
    products = product(q_XMD, keys_PGCD.flatten(0, 1).transpose(1, 2), part).float()
    batch_invariant_attention.cap_(products, scores)
    scores_PGMC = products.view(-1, groups, rows, PAGE)
    scores_PGQC = scores_PGMC[:, :, :queries].add_(table.bias_P11C(scores.window))
    top_NGQ = table.highest(scores_PGQC.amax(-1))
    sinks_GQ = None if scores.sinks_H is None else scores.sinks_H.view(groups, queries)
    top_NGQ = top_NGQ if sinks_GQ is None else torch.maximum(top_NGQ, sinks_GQ)
    scores_PGQC.sub_(top_NGQ.index_select(0, table.owner_P)[..., None]).exp_()
    sums_NGQ = table.summed(scores_PGQC.sum(-1))
    sums_NGQ = sums_NGQ if sinks_GQ is None else sums_NGQ + (sinks_GQ - top_NGQ).exp()
    p_XMC = scores_PGMC.flatten(0, 1).to(values_PGCE.dtype)
    outputs_PGME = product(p_XMC, values_PGCE.flatten(0, 1), part).view(-1, groups, rows, values_PGCE.shape[-1])
    outputs_NGQE = table.added(outputs_PGME[:, :, :queries].float())
    return (outputs_NGQE / sums_NGQ[..., None]).to(q_NGQD.dtype)


def found_layout(
    exactness: Exactness, heads: int, groups: int, width: int, scores: ScoreRule, device: torch.device
) -> AttentionLayout:
    """The layout of attention's products of these sizes that keeps the bits on this device, if there is one."""

    def keeps_bits(layout: AttentionLayout) -> bool:
        return is_invariant(heads, groups, width, replace(scores, layout=layout), device)

    return exactness.attention(f"attention {heads}x{groups}x{width} {scores}", LAYOUTS, keeps_bits, device)


@torch.inference_mode()
def is_invariant(heads: int, groups: int, width: int, scores: ScoreRule, device: torch.device) -> bool:
    """Whether on this device a row has the same bits in a sequence, in a prefix of it, as its rest, among others, and
    decoded.
    """
    tokens = 3 * PAGE + 5
    window = None if scores.window is None else min(scores.window, PAGE + 9)
    scores = replace(scores, window=window)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, tokens, count, width, generator=generator).to(device) for count in (heads, groups, groups)
    )
    both = causal(q, k, v, scores=scores)
    q, k, v, whole = (x[:1] for x in (q, k, v, both))
    if not torch.equal(causal(q, k, v, scores=scores), whole):
        return False
    for count in (1, 7, *range(9, PAGE, 8), PAGE, PAGE + 1, 2 * PAGE + 9):  # ends of each number of rows
        prefix = causal(*(x[:, :count] for x in (q, k, v)), scores=scores)
        suffix = causal(q[:, count:], k, v, scores=scores)
        if not (torch.equal(prefix, whole[:, :count]) and torch.equal(suffix, whole[:, count:])):
            return False
        keys, values = (paged(x[0, :count]) for x in (k, v))
        table = PageTable.of([count - 1], [range(len(keys))], device)
        row_1GQD = q[:, count - 1].view(1, groups, heads // groups, width)
        if not torch.equal(decoded(row_1GQD, keys, values, table, scores).flatten(1, 2), whole[:, count - 1]):
            return False
    return True


def paged(x_TGX: Tensor) -> Tensor:
    """(P, G, C, X): a sequence's keys or values in pages, in order, zeros after the last token."""
    whole = F.pad(x_TGX, (0, 0, 0, 0, 0, -len(x_TGX) % PAGE))
    return whole.view(-1, PAGE, *x_TGX.shape[1:]).transpose(1, 2)
