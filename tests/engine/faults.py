"""Allocations that fail, below all code of ours: torch's own operators raise what its allocators raise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from knapper.engine.executor import Executor, Work

CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 419430400 bytes. Error code 12 (Cannot allocate memory)"
)
GPU_SAYS = "CUDA out of memory. Tried to allocate 1024.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


def cpu_error() -> Exception:
    return RuntimeError(CPU_SAYS)


def gpu_error() -> Exception:
    return torch.OutOfMemoryError(GPU_SAYS)


class Operators(TorchDispatchMode):
    """Counts the operators of its thread; those for which `breaks(number, name)` raise `error()` in their place."""

    def __init__(self, breaks: Callable[[int, str], bool], error: Callable[[], Exception]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library has no types here
        self.count = self.broken = 0
        self._breaks, self._error = breaks, error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self._breaks(self.count, str(func)):
            self.broken += 1
            raise self._error()
        return func(*args, **(kwargs or {}))


@contextmanager
def on(device: Executor, mode: TorchDispatchMode) -> Iterator[None]:
    """The mode is that of the device's thread."""

    def enter() -> Work[None]:
        yield from ()
        mode.__enter__()

    def leave() -> Work[None]:
        yield from ()
        mode.__exit__(None, None, None)

    device.submit(enter()).result(60)
    try:
        yield
    finally:
        device.submit(leave()).result(60)
