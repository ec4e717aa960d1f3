"""silu and its like, in which a number's bits do not depend on where it lies among the others.

A CPU computes them in whole vector registers, and what is left over at a tensor's end, or at the end of a thread's
part of it, one number at a time by another library's exp; the two may differ in the last bit. So numbers are handed
over flat, followed by zeros until every thread's part is whole registers. Arithmetic, roots, exp, log and tanh alone
have the same bits both ways, and so does everything on a GPU.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers that torch's loops take at a time: two registers, of AVX-512 and of the smallest type.
_STRIDE: Final = 64
_NUMBERS_A_THREAD: Final = 32768  # at least: at::internal::GRAIN_SIZE
_NUMBERS_ALONE: Final = 16384  # of gelu; more are shared by all threads: GELU_MIN_ELEMENTS_FOR_MULTI_THREADING


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x)."""
    return _in_whole_registers(F.silu, x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh. Source: arXiv 1606.08415, section 2."""
    return _in_whole_registers(partial(F.gelu, approximate="tanh"), x, _threads_of_gelu)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return _in_whole_registers(torch.sigmoid, x)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x))."""
    return _in_whole_registers(F.softplus, x)


def _threads(numbers: int) -> int:
    """Among how many torch divides so many."""
    return max(1, min(torch.get_num_threads(), -(-numbers // _NUMBERS_A_THREAD)))


def _threads_of_gelu(numbers: int) -> int:
    """Its gradient is divided as any other function is: so many parts as both divide."""
    return math.lcm(torch.get_num_threads() if numbers > _NUMBERS_ALONE else 1, _threads(numbers))


def _in_whole_registers(
    function: Callable[[Tensor], Tensor], x: Tensor, threads: Callable[[int], int] = _threads
) -> Tensor:
    if x.device.type != "cpu":
        return function(x)
    missing = _whole(x.numel(), threads) - x.numel()
    if not missing and x.shape[-1] % _STRIDE == 0 and x.stride(-1) == 1:
        return function(x)  # its rows may lie apart, as halves of wider ones do
    flat = x.reshape(-1)
    return function(F.pad(flat, (0, missing)) if missing else flat)[: len(flat)].view(x.shape)


def _whole(numbers: int, threads: Callable[[int], int]) -> int:
    """At least `numbers`, in equal parts of whole registers for the threads."""
    while missing := -numbers % (threads(numbers) * _STRIDE):
        numbers += missing
    return numbers
