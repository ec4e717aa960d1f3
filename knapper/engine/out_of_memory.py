"""Out-of-memory errors of every library in one form, and the error that the user gets."""

import re
from typing import Final, Self, TypeVar

import torch

from knapper.engine import hardware
from knapper.errors import OutOfMemory
from knapper.text.sizes import sized

E = TypeVar("E", bound=BaseException)

_PHRASES: Final = (  # of a RuntimeError; torch has an error type for GPUs only
    "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "MPS backend out of memory",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc",
    "could not create a primitive", "could not create a memory object",  # oneDNN's, which give no reason
)  # fmt: skip
_NEEDED: Final = re.compile(r"(?:[Tt]ried to allocate|Unable to allocate) ([\d.]+) (bytes|[KMGT]i?B)\b")
_UNITS: Final = {"bytes": 1} | {f"{p}{i}B": 1024**n for n, p in enumerate("KMGT", 1) for i in ("", "i")}


class MemoryShortage(Exception):
    """An allocation failed. `needed`: its bytes, if the error says so.

    It has no traceback, unlike the original error, whose frames keep all tensors of the pass alive.
    """

    def __init__(self, needed: int | None) -> None:
        super().__init__("out of memory")
        self.needed = needed

    @classmethod
    def of(cls, error: BaseException) -> Self | None:
        """None for an error of another kind."""
        message = str(error)
        is_memory_error = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory_error and not (
            isinstance(error, RuntimeError) and any(phrase in message for phrase in _PHRASES)
        ):
            return None
        match = _NEEDED.search(message)
        return cls(None if match is None else int(float(match[1]) * _UNITS[match[2]]))

    def error(self, subject: str, device: torch.device, todo: str) -> OutOfMemory:
        """The error for the caller whose `subject` did not fit."""
        free = sized(hardware.memory_left(device))
        needed = f"more than the {free} that are free" if self.needed is None else f"{sized(self.needed)} at once"
        as_shortage = "" if self.needed is None else f"; {free} are free"
        return OutOfMemory(f"{subject} does not fit into the server's memory: it needs {needed}{as_shortage}. {todo}")


def as_shortage(error: E) -> "E | MemoryShortage":
    """The error itself, or the MemoryShortage in place of an out-of-memory error, which would keep tensors alive."""
    return MemoryShortage.of(error) or error
