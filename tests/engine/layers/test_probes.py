"""How rows go into a product is found out: the first way in which no row's bits depend on the others."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.batch_invariance import (
    ADAPTER_LAYOUTS,
    BACKWARD_LAYOUTS,
    MODEL_LAYOUTS,
    UNCHANGED,
    Exactness,
    Product,
    RowLayout,
)

INPUTS, OUTPUTS = 96, 40
LARGER = (96, 128, 192, 256, 384, 512, 768, 1024)


def summed(x_NI: Tensor, w_OI: Tensor, parts: int) -> Tensor:
    """x w^T, whose inner dimension is added up in so many parts: other last bits for each number."""
    products = [x @ w.T for x, w in zip(x_NI.float().chunk(parts, 1), w_OI.float().chunk(parts, 1), strict=True)]
    return torch.stack(products).sum(0).to(x_NI.dtype)


def kernels(choose: Callable[[int], int]) -> Callable[[Tensor], Product]:
    """A library that chooses a kernel by the number of rows. Each of these kernels is exact by itself: row by row."""

    def make(w_OI: Tensor) -> Product:
        return lambda x_NI: torch.cat([summed(row, w_OI, choose(len(x_NI))) for row in x_NI.split(1)])

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("choose", "way"),
    [
        (lambda _: 3, UNCHANGED),
        (lambda rows: 1 if rows == 1 else 4, RowLayout(2)),
        (lambda rows: 2 if rows < 7 else 4, RowLayout(8)),
        (lambda rows: 2 if rows < 11 else 4, RowLayout(16)),
        (lambda rows: 2 if 8 < rows < 13 else 4, RowLayout(16)),  # as MKL's are by AVX2 on two threads
        (lambda rows: 2 if rows == 15 else 4, RowLayout(16)),
        (lambda rows: 1 + min(rows // 32, 3), RowLayout(block=128, larger=LARGER[2:])),
        (lambda rows: 4 if rows < 100 and rows % 2 else 2, RowLayout(block=64, larger=LARGER)),
        (lambda rows: 1 if rows < 33 or rows > 512 else 2, RowLayout(block=64, larger=LARGER[:-2])),
    ],
)
def test_the_first_way_that_keeps_the_bits_is_taken(
    dtype: torch.dtype, choose: Callable[[int], int], way: RowLayout
) -> None:
    exactness = Exactness()
    like = torch.empty(0, dtype=dtype)
    assert exactness.product("forward", MODEL_LAYOUTS, kernels(choose), INPUTS, OUTPUTS, like) == way
    assert exactness.broken == []
    assert len(exactness.layouts) == (way != UNCHANGED)


def test_where_no_way_keeps_the_bits_it_is_said_and_the_product_goes_as_it_would() -> None:
    def make(w_OI: Tensor) -> Product:
        def first_row_differs(x_NI: Tensor) -> Tensor:
            return torch.cat([summed(x_NI[:1], w_OI, 2), summed(x_NI[1:], w_OI, 4)])

        return first_row_differs

    exactness = Exactness()
    way = exactness.product("forward", MODEL_LAYOUTS, make, INPUTS, OUTPUTS, torch.empty(0))
    assert way == UNCHANGED
    assert exactness.broken == [f"forward {INPUTS}x{OUTPUTS} float32"]


def test_without_the_promise_nothing_is_tried() -> None:
    def never(_: Tensor) -> Product:
        raise AssertionError

    exactness = Exactness(promised=False)
    assert exactness.product("forward", MODEL_LAYOUTS, never, INPUTS, OUTPUTS, torch.empty(0)) == UNCHANGED
    assert exactness.adapter(16, torch.empty(0)) == UNCHANGED
    on_gpu = torch.empty(0, device="meta")
    assert Exactness().product("forward", MODEL_LAYOUTS, never, INPUTS, OUTPUTS, on_gpu) == UNCHANGED


WAYS = {*MODEL_LAYOUTS, *BACKWARD_LAYOUTS, *ADAPTER_LAYOUTS, RowLayout(block=64, larger=(96, 256))}


@pytest.mark.parametrize("way", sorted(WAYS, key=str), ids=str)
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 63, 64, 65, 129, 300, 1100])
def test_every_way_gives_the_product(way: RowLayout, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x_NI, w_OI = (torch.randn(n, 24, generator=generator, dtype=torch.float64) for n in (rows, 10))
    seen: list[int] = []

    def product(x: Tensor) -> Tensor:
        seen.append(len(x))
        return F.linear(x, w_OI)

    torch.testing.assert_close(way(product, x_NI), x_NI @ w_OI.T, rtol=0, atol=1e-12)
    assert sum(seen) == way.rows(rows) >= max(rows, way.least)
    assert not way.block or {way.block, *way.larger} >= set(seen)


def test_rows_go_into_the_fewest_blocks_that_are_not_mostly_padding() -> None:
    layout = RowLayout(block=64, larger=(96, 128, 512))
    assert [layout.rows(count) for count in (1, 64, 65, 140, 300, 508, 576, 1016)] == [
        64,
        64,
        96,
        160,
        320,
        512,
        576,
        1024,
    ]


def test_an_adapter_goes_one_way_on_every_linear_whether_it_trains_or_decodes() -> None:
    exactness = Exactness()
    exactness.add(64, (48, 16, 16))
    exactness.add(160, (64,))
    way = exactness.adapter(32, torch.empty(0))
    assert replace(way, larger=()) in ADAPTER_LAYOUTS
    assert exactness.adapter(32, torch.empty(0)) is way
    assert exactness.broken == []
