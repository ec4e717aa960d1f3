"""A number that is none stays in its row: what one request computes cannot reach another through a product.

AMX's tiles read past a row where the inner size is no whole number of tiles, and NaN times zero is NaN.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from knapper.engine.layers import batch_invariant_attention, head, paged_attention
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_gathered import GatheredLora, Stack
from knapper.engine.layers.lora_grouped import Segment, Segments
from knapper.engine.models.layer import ScoreRule

# Inner sizes that are no whole number of tiles, odd ones among them, and some that are.
SIZES = [(5, 8), (15, 16), (17, 64), (31, 33), (32, 48), (33, 23), (48, 49), (576, 192), (577, 191)]
PLANTED = [float("nan"), float("inf"), -float("inf")]
ROWS = [2, 5, 16, 33, 130]
DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_stays(compute: Callable[[Tensor], Tensor], x_N: Tensor, planted: float) -> None:
    """Every row but those that were planted has the bits that it has beside healthy ones."""
    healthy = compute(x_N)
    assert healthy.isfinite().all()
    for sick in {0, len(x_N) // 2, len(x_N) - 1}:
        x = x_N.clone()
        x[sick] = planted
        outputs = compute(x)
        assert not outputs[sick].isfinite().all(), "the planted row shows what was planted, or nothing was tested"
        others = [row for row in range(len(x_N)) if row != sick]
        assert torch.equal(outputs[others], healthy[others]), (sick, planted)


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
@pytest.mark.parametrize("pack", [True, False])
def test_of_a_frozen_linear_and_its_gradient(
    inputs: int, outputs: int, dtype: torch.dtype, planted: float, pack: bool
) -> None:
    weight = random(outputs, inputs, seed=1, dtype=dtype)
    linear = FrozenLinear(weight.split([outputs - 3, 3]), dtype, pack=pack)
    for rows in ROWS:
        assert_stays(linear, random(rows, inputs, seed=2, dtype=dtype), planted)
        assert_stays(
            lambda g: linear.back(g.split(linear.widths, 1)), random(rows, outputs, seed=3, dtype=dtype), planted
        )


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4, 17, 32])
def test_of_adapters_in_training_and_in_decoding(rank: int, dtype: torch.dtype, planted: float) -> None:
    inputs, outputs = 33, 23
    linear = FrozenLinear([random(outputs, inputs, seed=1, dtype=dtype)], dtype)
    loras = [
        Lora({"q": random(rank, inputs, seed=seed)}, {"q": random(outputs, rank, seed=seed + 9)}, 0.5)
        for seed in (10, 11, 12)
    ]
    row_loras = [loras[row % 3] if row % 4 else None for row in range(18)]

    def decoded(x_NI: Tensor) -> Tensor:
        return GatheredLora(Stack(loras), row_loras, torch.device("cpu"))(["q"], x_NI, linear)[0]

    def trained(x_NI: Tensor) -> Tensor:
        segments = Segments([Segment(0, 5, loras[0]), Segment(5, 7, None), Segment(7, 18, loras[1])])
        with torch.no_grad():
            return segments(["q"], x_NI, linear)[0]

    for compute in (decoded, trained):
        assert_stays(compute, random(18, inputs, seed=2, dtype=dtype), planted)


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [33, 50, 257])
def test_of_the_head(vocabulary: int, dtype: torch.dtype, planted: float) -> None:
    linear = FrozenLinear([random(vocabulary, 31, seed=1, dtype=dtype)], dtype)
    targets = torch.arange(12) % vocabulary

    def logprobs(x_NH: Tensor) -> Tensor:
        return head.target_logprobs(x_NH, linear, targets)[:, None]

    def gradient(x_NH: Tensor) -> Tensor:
        x_NH = x_NH.detach().requires_grad_()
        head.target_logprobs(x_NH, linear, targets).sum().backward()
        assert x_NH.grad is not None
        return x_NH.grad

    for compute in (logprobs, gradient):
        assert_stays(compute, random(12, 31, seed=2, dtype=dtype), planted)


@pytest.mark.parametrize("planted", PLANTED)
@pytest.mark.parametrize("width", [8, 24, 64])
@pytest.mark.parametrize(("window", "cap"), [(None, None), (9, None), (None, 2.0)])
def test_of_attention_over_several_texts(width: int, window: int | None, cap: float | None, planted: float) -> None:
    scores = ScoreRule(width**-0.5, window, cap)
    sequences, tokens, heads, groups = 3, 70, 4, 2
    k, v = (random(sequences, tokens, groups, width, seed=seed) for seed in (2, 3))
    pages = paged_attention.PageTable.of(sequences * [tokens - 1], [(5, 0), (3, 1), (2, 4)], k.device)
    in_order = [5, 0, 3, 1, 2, 4]
    keys, values = (torch.empty(6, groups, paged_attention.PAGE, width) for _ in "kv")
    for stored, x in ((keys, k), (values, v)):
        stored[in_order] = torch.cat([paged_attention.paged(of_one) for of_one in x])

    def trained(q: Tensor) -> Tensor:
        return batch_invariant_attention.causal(q, k, v, scores=scores)

    def decoded(q: Tensor) -> Tensor:
        return paged_attention.decoded(
            q[:, 0].view(sequences, groups, heads // groups, width), keys, values, pages, scores
        )

    for compute in (trained, decoded):
        assert_stays(compute, random(sequences, tokens, heads, width, seed=1), planted)
