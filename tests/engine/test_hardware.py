"""The device is chosen in one place, and a wrong one is refused with what the machine has."""

import pytest
import torch

from knapper.engine.hardware import device_for, dtype_for
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
