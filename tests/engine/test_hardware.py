"""The device is chosen in one place, and a wrong one is refused with what the machine has."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import accumulate, chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import knapper
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


def _clock(float32_s: Iterable[float], bfloat16_s: Iterable[float]) -> Callable[[], float]:
    """Of a thread on which a product takes so long, turn by turn."""
    took = zip(float32_s, bfloat16_s, strict=True)
    return accumulate(chain.from_iterable((0.0, wide_s, 0.0, narrow_s) for wide_s, narrow_s in took)).__next__


@pytest.mark.parametrize(
    ("float32_s", "bfloat16_s", "chosen"),
    [
        ([9, 1.82, 1.82, 1.82, 1.82, 1.82], [9, 1, 1, 1, 1, 1], torch.bfloat16),  # Zen 4
        ([9, 0.75, 0.75, 0.75, 0.75, 0.75], [9, 1, 1, 1, 1, 1], torch.float32),  # Sapphire Rapids without AMX
        ([9, 7.2, 7.2, 7.2, 7.2, 7.2], [9, 1, 1, 1, 1, 1], torch.bfloat16),  # and with it
        ([9, 1.3125, 1.3125, 1.3125, 1.3125, 1.3125], [9, 1, 1, 1, 1, 1], torch.bfloat16),
        ([9, 1.25, 1.25, 1.25, 1.25, 1.25], [9, 1, 1, 1, 1, 1], torch.float32),  # no margin, no change
        ([9, 50, 50, 0.75, 50, 50], [9, 50, 1, 50, 50, 50], torch.float32),  # disturbed in most turns
        ([9, 50, 50, 1.82, 50, 50], [99, 1, 50, 50, 50, 50], torch.bfloat16),
        ([0.1, 1.82, 1.82, 1.82, 1.82, 1.82], [9, 1, 1, 1, 1, 1], torch.bfloat16),  # the first turn says nothing
    ],
)
def test_auto_takes_bfloat16_on_a_cpu_that_is_clearly_faster_in_it(
    float32_s: list[float], bfloat16_s: list[float], chosen: torch.dtype
) -> None:
    assert dtype_for("auto", torch.device("cpu"), _clock(float32_s, bfloat16_s)) == chosen


def test_measuring_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        dtype_for("auto", torch.device("cpu"))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN's variable is for x86")
def test_auto_sees_that_onednn_may_not_use_the_instructions() -> None:
    """Without any for bfloat16 its products take four times as long as float32's, whatever the CPU's flags say."""
    code = "import torch; from knapper.engine.hardware import dtype_for; print(dtype_for('auto', torch.device('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=Path(knapper.__file__).parent.parent, check=True, capture_output=True, text=True,
    )  # fmt: skip
    told, chosen = done.stdout.splitlines()
    assert chosen == "torch.float32"
    assert "KNAPPER_DTYPE is auto: measured" in told
    assert "dtype=float32" in told
    assert "is taken from 1.3 on" in told


def test_a_dtype_that_is_asked_for_is_taken_unmeasured() -> None:
    def never() -> float:
        raise AssertionError("nobody asked how fast it is")

    for setting, chosen in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert dtype_for(setting, torch.device("cpu"), never) == chosen


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
