"""Copies from the host to the device: by one function, so that none of them waits.

A GPU copies from page-locked memory beside its other work. From any other memory the copy first waits for all work that
was queued, as `.item()` does, whatever `non_blocking` says.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Numbers = NDArray[np.generic] | Sequence[int] | Sequence[float] | Sequence[bool]


def to_device(values: Numbers | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """`values` on the device, in `dtype` (None: their own). On a CPU an array's memory is shared, not copied."""
    host = _on_host(values, dtype)
    if device.type in ("cpu", "mps"):  # the same memory
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def _on_host(values: Numbers | Tensor, dtype: torch.dtype | None) -> Tensor:
    if not isinstance(values, Tensor | np.ndarray):
        return torch.tensor(values, dtype=dtype)  # at once: Python's floats have 64 bits
    host = values if isinstance(values, Tensor) else torch.from_numpy(values)
    return host if dtype is None else host.to(dtype)
