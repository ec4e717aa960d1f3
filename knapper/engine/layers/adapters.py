"""LoRA on the frozen linears: several adapters, each on its own rows, over one base.

N rows, I inputs, O outputs, R rank. delta = (scale * (x A^T)) B^T (arXiv 2106.09685, section 4.1), in the adapter's
dtype (float32 for a trained one), or rounded to the base's where that is much faster (`for_products`); the sum is
rounded to the base's dtype. `Segments` differentiates, `GatheredLora` decodes.
"""

import os
from collections.abc import Sequence
from functools import cache
from typing import Final, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.layers.batch_invariance import RowLayout
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora

_RANK_MULTIPLE: Final = 16
_LIMITS: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # which instructions oneDNN may use; the second is older


def padded_rank(rank: int) -> int:
    """The rank that a GEMM computes: fewer columns are slower. Adapters of one padded rank share a batch."""
    return rank + -rank % _RANK_MULTIPLE


def pad_rank(matrix: Tensor, dim: int) -> Tensor:
    """A or B of an adapter with zeros along its rank `dim`, up to `padded_rank`."""
    missing = padded_rank(matrix.shape[dim]) - matrix.shape[dim]
    return matrix if missing == 0 else F.pad(matrix, (0, 0) * (matrix.dim() - 1 - dim) + (0, missing))


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 many times as fast as float32: by AMX, if oneDNN may use it.

    By what the CPU has and not by a measurement: training and sampling, and every start, must take the same.
    """
    limits = [os.environ.get(name, "") for name in _LIMITS]  # noqa: TID251  oneDNN's own variables, not settings
    allowed = all(limit.upper() in ("", "ALL", "DEFAULT") or "AMX" in limit.upper() for limit in limits)
    return allowed and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def for_products(matrix: Tensor, x_N: Tensor) -> Tensor:
    """A or B as products with rows `x_N` take it: a copy in bfloat16 where both may be, added up in float32."""
    rounds = x_N.dtype == torch.bfloat16 and x_N.device.type == "cpu" and multiplies_bfloat16()
    return matrix.to(torch.bfloat16) if rounds else matrix


def product(layout: RowLayout, x_MI: Tensor, w_OI: Tensor) -> Tensor:
    """x w^T (M, O), of an adapter's matrix."""
    return layout(lambda x: F.linear(x, w_OI), x_MI)


class Adapt(Protocol):
    """The adapters of a pass, by rows."""

    def __call__(self, names: Sequence[str], x_NI: Tensor, linear: FrozenLinear) -> tuple[Tensor, ...]:
        """A linear with the adapters' part.

        `names`: the target modules that `linear` stacks. Returns one tensor (N, width) for each.
        """
        ...

    @property
    def loras(self) -> Sequence[Lora]: ...

    def numbers(self, rows: int, device: torch.device) -> Tensor:
        """Of each row its adapter's place in `loras`, int64 (N,); len(loras): the base model."""
        ...
