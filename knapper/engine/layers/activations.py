"""Activations whose bits do not depend on where an element lies.

On a CPU torch divides an elementwise operation among threads, and computes what is left of whole registers at the end
of each thread's part by other instructions: silu, sigmoid, GELU and softplus have other last bits there. So a row's
bits would depend on how many rows there are. Here the elements are filled up until every part ends at a whole register;
the sizes of most models need nothing. The gradient's operation has the same elements, and so the same parts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

_REGISTERS: Final = 64  # elements of a step: two of the widest registers, of 16 bits each
_GRAIN: Final = 32768  # at::internal::GRAIN_SIZE: a thread more for each so many elements
_GELU_MOST: Final = 0x4000  # elements that GELU leaves to one thread; of more every thread takes a part
Parts = Callable[[int, int], int]  # of elements and threads: how many threads take part


def silu(x: Tensor) -> Tensor:
    return _by_registers(F.silu, x)


def gelu_tanh(x: Tensor) -> Tensor:
    return _by_registers(partial(F.gelu, approximate="tanh"), x, _parts_of_gelu)


def sigmoid(x: Tensor) -> Tensor:
    return _by_registers(torch.sigmoid, x)


def softplus(x: Tensor) -> Tensor:
    return _by_registers(F.softplus, x)


def _parts(elements: int, threads: int) -> int:
    return max(1, min(threads, -(-elements // _GRAIN)))


def _parts_of_gelu(elements: int, threads: int) -> int:
    """A number that both its own parts and its gradient's divide, which are those of any operation."""
    return math.lcm(threads if elements > _GELU_MOST else 1, _parts(elements, threads))


def _by_registers(activation: Callable[[Tensor], Tensor], x: Tensor, parts: Parts = _parts) -> Tensor:
    if x.device.type != "cpu":
        return activation(x)
    rows_are_whole = x.stride(-1) == 1 and x.shape[-1] % _REGISTERS == 0
    count = _whole(x.numel(), torch.get_num_threads(), parts)
    if count == x.numel() and (x.is_contiguous() or rows_are_whole):
        return activation(x)
    y = _Filled.apply(activation, count, x)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(y, Tensor)
    return y


class _Filled(torch.autograd.Function):
    """The activation of the elements in one row, filled up with zeros. It keeps the input as it is, and no copy."""

    @staticmethod
    def forward(ctx: Any, activation: Callable[[Tensor], Tensor], count: int, x: Tensor) -> Tensor:
        ctx.activation, ctx.count = activation, count
        ctx.save_for_backward(x)
        return activation(_filled(x, count))[: x.numel()].view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            row = _filled(x.detach(), ctx.count).requires_grad_()
            (grad,) = torch.autograd.grad(ctx.activation(row), row, _filled(grads[0], ctx.count))
        return None, None, grad[: x.numel()].view(x.shape)


def _filled(x: Tensor, count: int) -> Tensor:
    return F.pad(x.flatten(), (0, count - x.numel()))


def _whole(elements: int, threads: int, parts: Parts) -> int:
    """A count from `elements` on whose parts, one for each thread that takes part, are of whole registers."""
    count, taking = elements, 0
    while taking != parts(count, threads):
        taking = parts(count, threads)
        count = elements + -elements % (_REGISTERS * taking)
    return count
