"""Products in halves: the bits of one product, and only where that holds."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from knapper.engine import products

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (4096, 64)]  # SmolLM2-135M's linears, and a narrow head


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_halves_have_the_bits_of_one_product_whatever_the_rows(outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(64, inputs, generator=generator)
    whole = F.linear(x, weight)
    with torch.no_grad():
        for rows in (8, 16, 17, 40, 64):
            assert torch.equal(products.linear(x[:rows], weight), whole[:rows]), rows


def test_another_order_of_adding_is_seen() -> None:
    """What a machine would be refused for: here the inputs are added from the last to the first."""
    weight = torch.randn(256, 576, generator=torch.Generator().manual_seed(0))
    assert products.agrees(products.halves, weight)
    assert not products.agrees(lambda x, w: products.halves(x.flip(1), w.flip(1)), weight)


def test_training_differentiates_one_product() -> None:
    x = torch.ones(8, 32, requires_grad=True)
    products.linear(x, torch.ones(256, 32)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((8, 32), 256.0))


@pytest.mark.parametrize("outputs", [63, 64, 129])
def test_outputs_that_have_no_halves_are_one_product(outputs: int) -> None:
    weight, x = torch.ones(outputs, 16), torch.ones(8, 16)
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight), F.linear(x, weight))


def test_a_bias_is_added() -> None:
    weight, x, bias = torch.ones(256, 16), torch.ones(8, 16), torch.arange(256.0)
    with torch.no_grad():
        assert torch.equal(products.linear(x, weight, bias), F.linear(x, weight, bias))
