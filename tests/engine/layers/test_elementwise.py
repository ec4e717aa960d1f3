"""Functions of a number alone: its bits depend neither on its place and company nor on the number of threads."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers import elementwise

ENGINE = Path(__file__).parents[3] / "knapper" / "engine"
Function = Callable[[Tensor], Tensor]
FUNCTIONS: dict[Function, Function] = {
    elementwise.silu: F.silu,
    elementwise.gelu_tanh: lambda x: F.gelu(x, approximate="tanh"),
    elementwise.sigmoid: torch.sigmoid,
    elementwise.softplus: F.softplus,
}
WIDTHS = (1, 6, 8, 24, 48, 144, 268, 576, 1536)


@pytest.fixture(params=[1, 2, 3, 5, 8], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def value_and_gradient(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    y.backward(torch.ones_like(y) * 0.7)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_number_has_its_bits_wherever_it_lies(function: Function, dtype: torch.dtype) -> None:
    """Rows of a tensor, some of them in another order, halves of wider rows, and each of the first rows alone."""
    draw = torch.Generator().manual_seed(0)
    for width in WIDTHS:
        wide_NW = torch.randn(257, 2 * width, generator=draw).mul(3).to(dtype)
        x_NW = wide_NW[:, width:].contiguous()
        y_NW, slope_NW = value_and_gradient(function, x_NW)
        some = torch.randperm(257, generator=draw)[:211]
        companies = [(some, x_NW[some]), (torch.arange(257), wide_NW[:, width:])]
        companies += [(torch.tensor([n]), x_NW[n : n + 1]) for n in range(5)]
        for rows, x in companies:
            y, slope = value_and_gradient(function, x)
            assert torch.equal(y, y_NW[rows]), (width, len(rows))
            assert torch.equal(slope, slope_NW[rows]), (width, len(rows))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_a_gradient_that_more_threads_share_than_the_function_has_its_bits(function: Function) -> None:
    """GELU's gradient is divided otherwise than GELU."""
    x_NW = torch.randn(1001, 96, generator=torch.Generator().manual_seed(0)).mul(2)
    _, slope_NW = value_and_gradient(function, x_NW)
    for start in range(0, 1001, 77):
        rows = slice(start, start + 64)
        assert torch.equal(value_and_gradient(function, x_NW[rows])[1], slope_NW[rows]), start


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_it_is_the_function_that_it_is_named_after(function: Function) -> None:
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64).mul(4)
    value, slope = value_and_gradient(function, x)
    expected, expected_slope = value_and_gradient(FUNCTIONS[function], x)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-14, atol=1e-14)
    assert function(torch.empty(0, 3)).shape == (0, 3)


def test_the_engine_computes_them_nowhere_else() -> None:
    """`silu` by whatever name: F.silu, x.silu(), torch.nn.SiLU."""
    suspects = {"silu", "silu_", "sigmoid", "sigmoid_", "softplus", "gelu", "mish", "hardswish", "logsigmoid", "elu"}
    found = [
        f"{path.relative_to(ENGINE)}:{node.lineno}: {node.attr}"
        for path in sorted(ENGINE.rglob("*.py"))
        if path.name != "elementwise.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr.lower() in suspects
        and not (isinstance(node.value, ast.Name) and node.value.id in {"elementwise", "self"})
    ]
    assert found == []
