"""Row padding that keeps a row's bits independent of the number of rows."""

from typing import Final

import torch
from torch import Tensor

from knapper.engine.layers.batch_invariance import RowLayout
from knapper.engine.layers.determinism import keeps_bits

_BLOCK: Final = 16


def padded_rows(rows: int) -> int:
    """Rows that a GEMM of the library computes.

    Small float32 GEMMs take other kernels, or split unevenly over threads; from 8 rows (then 16) on they do not.
    """
    return rows if rows >= 16 else 8 if rows <= 8 else 16


def padded(x_N: Tensor) -> Tensor:
    """`x_N` with zero rows at the end, up to `padded_rows`: computed, never read. `x_N` if none is missing."""
    missing = padded_rows(x_N.shape[0]) - x_N.shape[0]
    return x_N if missing == 0 else torch.cat([x_N, x_N.new_zeros(missing, *x_N.shape[1:])])


def row_sums(values_NV: Tensor) -> Tensor:
    """(N, 1). Without padding, the sum of a few rows is split over threads, in another order than that of many.

    A GPU splits them by the number of rows: where bits are kept, each sum is over as many.
    """
    if values_NV.device.type == "cpu" or not keeps_bits(values_NV.device):
        return padded(values_NV).sum(dim=1, keepdim=True)[: len(values_NV)]
    return RowLayout(block=_BLOCK)(lambda rows_NV: rows_NV.sum(dim=1, keepdim=True), values_NV)
