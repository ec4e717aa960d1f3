"""The device is chosen in one place, and a wrong one is refused with what the machine has."""

from types import SimpleNamespace

import pytest
import torch

from knapper.engine.hardware import device_for, dtype_for, kv_bytes, take_memory
from knapper.errors import InvalidField


def _machine(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "setting", "chosen"),
    [
        (True, False, "auto", "cuda"),
        (True, False, "cpu", "cpu"),
        (False, True, "auto", "cpu"),
        (False, True, "mps", "mps"),
        (False, False, "auto", "cpu"),
    ],
)
def test_a_device_is_chosen(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, setting: str, chosen: str) -> None:
    _machine(monkeypatch, cuda=cuda, mps=mps)
    assert device_for(setting) == torch.device(chosen)


def test_a_device_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, cuda=False, mps=True)
    with pytest.raises(InvalidField, match=r"KNAPPER_DEVICE is 'cuda'; allowed: auto, mps, cpu on this machine"):
        device_for("cuda")


def test_mps_computes_in_float32_unless_told() -> None:
    assert dtype_for("auto", torch.device("mps")) == torch.float32
    assert dtype_for("bfloat16", torch.device("mps")) == torch.bfloat16


def test_a_share_of_a_gpu_is_what_torch_gives_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda stands in for a GPU of 24 GiB, 6 of them weights; what it does with the fraction is torch's affair."""
    gib, capped = 2**30, dict[torch.device, float]()
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: capped.update({device: share})
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 6 * gib)
    cuda = torch.device("cuda")
    assert take_memory(cuda, 0.5) == 12 * gib
    assert capped == {cuda: 0.5}
    assert kv_bytes(cuda, 12 * gib, 2 * gib) == 1.5 * gib, "a quarter of what the weights leave"
    assert kv_bytes(cuda, 24 * gib, 2 * gib) == 2 * gib
    assert kv_bytes(cuda, 5 * gib, 2 * gib) == 0


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_a_memory_that_cannot_be_divided_is_taken_whole_or_refused(name: str) -> None:
    device = torch.device(name)
    assert take_memory(device, 1.0) is None
    assert kv_bytes(device, None, 7) == 7
    with pytest.raises(InvalidField, match=rf"KNAPPER_GPU_MEMORY_SHARE is 0.5; allowed: 1 on {name}: .*Unset it"):
        take_memory(device, 0.5)
