"""x W^T of few rows on a CPU with two threads: the outputs in two halves, with the bits of one product.

MKL splits a product of 8 to 64 float32 rows badly over two threads (the head of SmolLM2-135M: 22 ms with one, 22 with
two), and halves of it well: 1.6 to 1.9 times as fast, without a second copy of a weight. An output's bits depend on its
row and its column only, so halves change none; that is checked for each shape, where it is first used. With more
threads nothing was measured: there it is one product.
N rows, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

_threads: Final = 2
_rows_min, _rows_max = 8, 64
_columns_min: Final = 64  # of a half: narrower products take other kernels
_checked: Final[dict[tuple[int, int], bool]] = {}  # by outputs and inputs, whether halves have the same bits here


def linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """F.linear, bit for bit."""
    if (
        bias_O is not None  # a sum begins with it
        or torch.is_grad_enabled()  # halves would give a gradient with other bits
        or not _rows_min <= x_NI.shape[0] <= _rows_max
        or torch.get_num_threads() != _threads
        or weight_OI.device.type != "cpu"
        or not x_NI.dtype == weight_OI.dtype == torch.float32
        or not _same_bits(weight_OI)
    ):
        return F.linear(x_NI, weight_OI, bias_O)
    return halves(x_NI, weight_OI)


def halves(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """(N, O), of an even number of outputs; not differentiable."""
    (rows, inputs), outputs = x_NI.shape, weight_OI.shape[0]
    found_NO = x_NI.new_empty(rows, outputs)
    torch.bmm(
        x_NI.expand(2, rows, inputs),
        weight_OI.view(2, -1, inputs).transpose(1, 2),
        out=found_NO.view(rows, 2, -1).transpose(0, 1),
    )
    return found_NO


def agrees(product: Callable[[Tensor, Tensor], Tensor], weight_OI: Tensor) -> bool:
    """Whether it has the bits of F.linear with this weight."""
    generator = torch.Generator().manual_seed(0)
    inputs = weight_OI.shape[1]
    return all(
        torch.equal(product(x_NI, weight_OI), F.linear(x_NI, weight_OI))
        for x_NI in (torch.randn(rows, inputs, generator=generator) for rows in (_rows_min, _rows_max))
    )


def _same_bits(weight_OI: Tensor) -> bool:
    outputs, inputs = weight_OI.shape
    if (outputs, inputs) not in _checked:
        have_halves = outputs % 2 == 0 and outputs // 2 >= _columns_min
        _checked[outputs, inputs] = have_halves and agrees(halves, weight_OI)
    return _checked[outputs, inputs]
