"""Starts a backward pass from a tensor with a given gradient.

`torch.autograd.backward` does the same, but imports sympy when it is given a gradient: half a second of a cold start.
"""

from typing import Any

import torch
from torch import Tensor


def backward(output: Tensor, grad: Tensor) -> None:
    """Adds the gradients to every leaf of `output`, whose own is `grad`, of the same shape."""
    with torch.enable_grad():  # off inside the backward of another function
        seed = _Seed.apply(output, grad)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(seed, Tensor)
    seed.backward()


class _Seed(torch.autograd.Function):
    """A scalar of no value, through which `grad` enters the graph as it is."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, grad: Tensor) -> Tensor:
        assert output.shape == grad.shape, f"a gradient of {list(grad.shape)} for {list(output.shape)}"
        ctx.save_for_backward(grad)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad, None
