"""An activation of a row has the same bits wherever the row lies, by any number of threads, and so has its gradient."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from knapper.engine.layers import activations

Activation = Callable[[Tensor], Tensor]
ALL = [activations.silu, activations.gelu_tanh, activations.sigmoid, activations.softplus]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 48, 96, 2880])
@pytest.mark.parametrize("activation", ALL)
def test_neighbours_and_threads_change_no_bit(activation: Activation, width: int, dtype: torch.dtype) -> None:
    x_NW = (2 * torch.randn(601, width, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    torch.set_num_threads(1)
    each = torch.cat([activation(row[None]) for row in x_NW])
    (gradient_NW,) = torch.autograd.grad(each.float().sum(), x_NW)
    for threads in (1, 3, 4, 5):
        torch.set_num_threads(threads)
        for rows in (601, 333, 64):
            together = activation(x_NW[:rows])
            assert torch.equal(together, each[:rows]), (threads, rows)
            beside = torch.cat([x_NW, x_NW], dim=1)[:rows, width:]
            assert torch.equal(activation(beside), each[:rows]), (threads, rows)
            (found_NW,) = torch.autograd.grad(together.float().sum(), x_NW)
            assert torch.equal(found_NW[:rows], gradient_NW[:rows]), (threads, rows)


@pytest.mark.parametrize("activation", ALL)
def test_they_are_torchs_own(activation: Activation) -> None:
    x = torch.linspace(-100, 100, 128)
    plain = {"gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh")}
    name = activation.__name__
    expected = plain.get(name) or getattr(torch.nn.functional, name)
    assert torch.equal(activation(x), expected(x))
