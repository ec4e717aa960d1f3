"""A GPU's driver for torch's own Python: only what lies below that is a stub, and takes what the driver takes.

So what torch refuses is refused here too: a device without an index, a fraction that is no float.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

GIB = 2**30


@dataclass
class Driver:
    """`capped`: the fraction of the memory that each device may give. Sizes in bytes; one device, number 0."""

    total: int = 80 * GIB
    held: int = 0  # by tensors
    reserved: int = 0  # by torch, from which tensors come
    others: int = 0  # by other processes
    capability: tuple[int, int] = (9, 0)
    capped: dict[int, float] = field(default_factory=dict)
    emptied: int = 0  # how often torch gave back what it reserved

    def properties(self, index: int) -> SimpleNamespace:
        self._expect(index)
        major, minor = self.capability
        return SimpleNamespace(total_memory=self.total, major=major, minor=minor, name="stub")

    def set_fraction(self, fraction: float, index: int) -> None:
        self._expect(index)
        assert type(fraction) is float
        self.capped[index] = fraction

    def fraction(self, index: int) -> float:
        self._expect(index)
        return self.capped.get(index, 1.0)

    def statistics(self, index: int) -> dict[str, dict[str, dict[str, int]]]:
        self._expect(index)
        return {
            "allocated_bytes": {"all": {"current": self.held}},
            "reserved_bytes": {"all": {"current": self.reserved}},
        }

    def info(self, index: int) -> tuple[int, int]:
        self._expect(index)
        return self.total - self.others - self.reserved, self.total

    def empty(self) -> None:
        self.emptied += 1
        self.reserved = self.held

    @staticmethod
    def _expect(index: int) -> None:
        assert type(index) is int, f"the driver takes a device's number, not {index!r}"
        assert index == 0, f"there is no device {index}"


def with_gpu(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    """Torch finds the driver until the test ends."""
    for name, stub in {
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_getDevice": lambda: 0,
        "_cuda_setMemoryFraction": driver.set_fraction,
        "_cuda_getMemoryFraction": driver.fraction,
        "_cuda_memoryStats": driver.statistics,
        "_cuda_emptyCache": driver.empty,
    }.items():
        monkeypatch.setattr(torch._C, name, stub, raising=False)
    monkeypatch.setattr(torch.cuda, "_cudart", SimpleNamespace(cudaMemGetInfo=driver.info))
    monkeypatch.setattr(torch.cuda, "_get_device_properties", driver.properties, raising=False)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)  # it would ask for what the build needs of a card
    monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "_cached_device_count", None)
    return driver
