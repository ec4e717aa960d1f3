"""Attention over pages is that of training: to the last bit where bits are kept, wherever the pages lie."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers import paged_attention
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.batch_invariant_attention import causal
from knapper.engine.layers.paged_attention import PAGE, PageTable, paged
from knapper.engine.models.layer import ScoreRule

LENGTHS = [1, 64, 65, 200, 7, 128, 450]  # the new token counted
GROUPS, QUERIES, WIDTH = 2, 3, 16
RULES = [ScoreRule(0.3), ScoreRule(0.3, window=70), ScoreRule(0.3, window=9, cap=2.0)]


def laid_out_rule(rule: ScoreRule) -> ScoreRule:
    """With the layout that keeps the bits on this CPU."""
    exactness = Exactness()
    sizes = GROUPS * QUERIES, GROUPS, WIDTH
    layout = paged_attention.found_layout(exactness, *sizes, rule, torch.device("cpu"))
    assert exactness.broken == []
    return replace(rule, layout=layout)


def random(*sizes: int, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def laid_out(sequences: list[Tensor], pages: list[list[int]]) -> Tensor:
    """Keys or values (T, G, X) of each sequence, in its pages."""
    laid = torch.empty(sum(map(len, pages)), GROUPS, PAGE, sequences[0].shape[-1])
    for tokens, of_one in zip(sequences, pages, strict=True):
        laid[of_one] = paged(tokens)
    return laid


def shuffled(seed: int) -> list[list[int]]:
    counts = [-(-length // PAGE) for length in LENGTHS]
    order = np.random.default_rng(seed).permutation(sum(counts))
    return [part.tolist() for part in np.split(order, np.cumsum(counts)[:-1])]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_token_has_the_bits_that_it_has_in_training_wherever_its_pages_lie(rule: ScoreRule) -> None:
    q, k, v = (
        [random(length, heads, WIDTH, seed=100 * which + length) for length in LENGTHS]
        for which, heads in enumerate((GROUPS * QUERIES, GROUPS, GROUPS))
    )
    rule = laid_out_rule(rule)
    trained = [causal(*(x[None] for x in of_one), scores=rule)[0, -1] for of_one in zip(q, k, v, strict=True)]
    last_NGQD = torch.stack([x[-1] for x in q]).view(len(LENGTHS), GROUPS, QUERIES, WIDTH)
    for seed in range(3):
        pages = shuffled(seed)
        table = PageTable.of([length - 1 for length in LENGTHS], pages, torch.device("cpu"))
        decoded = paged_attention.decoded(last_NGQD, laid_out(k, pages), laid_out(v, pages), table, rule)
        assert torch.equal(decoded.flatten(1, 2), torch.stack(trained))


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_bits_are_not_kept_pages_are_added_up_in_any_order(rule: ScoreRule, dtype: torch.dtype) -> None:
    """Values may have another width than keys."""
    pages = shuffled(1)
    k, v = ([random(length, GROUPS, width, seed=length) for length in LENGTHS] for width in (WIDTH, 8))
    q = random(len(LENGTHS), GROUPS, QUERIES, WIDTH, seed=1)
    table = PageTable.of([length - 1 for length in LENGTHS], pages, torch.device("cpu"))
    q, keys, values = (x.to(dtype) for x in (q, laid_out(k, pages), laid_out(v, pages)))
    exact = paged_attention.decoded(q.float(), keys.float(), values.float(), table, rule)
    loose = paged_attention.decoded(q, keys, values, replace(table, in_order=False), rule)
    assert loose.dtype == dtype
    assert loose.shape == (len(LENGTHS), GROUPS, QUERIES, 8)
    atol = 1e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(loose.float(), exact, atol=atol, rtol=0)


def test_pages_hold_a_text_in_order_and_zeros_after_it() -> None:
    x = random(70, GROUPS, WIDTH, seed=1)
    pages = paged(x)
    assert pages.shape == (2, GROUPS, PAGE, WIDTH)
    assert torch.equal(pages.transpose(1, 2).flatten(0, 1), F.pad(x, (0, 0, 0, 0, 0, 58)))
