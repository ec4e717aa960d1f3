"""Where a row's bits are its own: on a CPU always, on a GPU if an operator asks for it (KNAPPER_BATCH_INVARIANT=true).

Then a GPU computes by the operations that a CPU computes by, and torch takes deterministic algorithms only. That is
torch's own switch, for the whole process, so it is asked for here and kept nowhere else.
"""

import os

import torch


def keeps_bits(device: torch.device) -> bool:
    """Whether the device computes by operations that keep a row's bits in any company."""
    return device.type == "cpu" or torch.are_deterministic_algorithms_enabled()


def keep_bits_on_gpu() -> None:
    """Before the first product on a GPU: cuBLAS reads then how it may use its workspace."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_deterministic_debug_mode("warn")  # the other function would import torch.compile
