"""The device is chosen in one place, a wrong one is refused with what the machine has."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate, chain
from pathlib import Path

import pytest
import torch

import knapper
from knapper.engine import hardware
from knapper.engine.hardware import device_for, dtype_for, memory_left, take_memory
from knapper.errors import InvalidField
from tests.engine.gpu import GIB, Driver, with_gpu


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch asks once whether there is an MPS, and keeps the answer."""
    torch.backends.mps.is_available.cache_clear()
    yield
    torch.backends.mps.is_available.cache_clear()


def _machine(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, mps: bool) -> None:
    if cuda:
        with_gpu(monkeypatch, Driver())
    monkeypatch.setattr(torch._C, "_mps_is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "setting", "chosen"),
    [
        (True, False, "auto", "cuda:0"),
        (True, False, "cuda", "cuda:0"),
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


@pytest.mark.parametrize("setting", ["auto", "cuda"])
def test_a_gpu_is_started_as_torch_and_its_driver_want_it(monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """What an engine does first, through torch's own Python: an H100 of which half is ours, 16 GiB of that weights."""
    driver = with_gpu(monkeypatch, Driver(total=80 * GIB))
    device = device_for(setting)
    assert take_memory(device, 0.5) == 40 * GIB
    assert driver.capped == {0: 0.5}
    driver.held, driver.reserved = 16 * GIB, 18 * GIB
    assert memory_left(device) == 24 * GIB
    assert dtype_for("auto", device) == torch.bfloat16
    hardware.release(device)
    assert driver.emptied == 1


@pytest.mark.parametrize(
    ("card", "capability", "dtype"),
    [("V100", (7, 0), "float32"), ("T4", (7, 5), "float32"), ("A100", (8, 0), "bfloat16"), ("L4", (8, 9), "bfloat16")],
)
def test_bfloat16_is_chosen_where_a_gpu_computes_it_itself(
    monkeypatch: pytest.MonkeyPatch, card: str, capability: tuple[int, int], dtype: str
) -> None:
    """Older cards only emulate it: torch would say that they support it, as a tensor of it can be made."""
    with_gpu(monkeypatch, Driver(capability=capability))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda _: True)  # emulation: on every card
    assert torch.cuda.is_bf16_supported()
    device = device_for("auto")
    assert dtype_for("auto", device) == getattr(torch, dtype), card
    if dtype == "bfloat16":
        assert dtype_for("bfloat16", device) == torch.bfloat16
    else:
        with pytest.raises(InvalidField, match=r"KNAPPER_DTYPE is 'bfloat16'; allowed: auto or float32 on .* emulate"):
            dtype_for("bfloat16", device)


def test_what_others_hold_of_a_gpu_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_gpu(monkeypatch, Driver(total=24 * GIB, held=6 * GIB, reserved=7 * GIB, others=12 * GIB))
    device = device_for("auto")
    take_memory(device, 1.0)
    assert memory_left(device) == 6 * GIB, "5 that nobody has, and 1 that torch has ready"
    driver.others = 20 * GIB
    assert memory_left(device) == 0


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
    log_line, chosen = done.stdout.splitlines()
    assert chosen == "torch.float32"
    assert "KNAPPER_DTYPE is auto: measured" in log_line
    assert "dtype=float32" in log_line
    assert "is taken from 1.3 on" in log_line


def test_a_dtype_that_is_asked_for_is_taken_unmeasured() -> None:
    def never() -> float:
        raise AssertionError("nobody asked how fast it is")

    for setting, chosen in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert dtype_for(setting, torch.device("cpu"), never) == chosen


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_a_memory_that_cannot_be_divided_is_taken_whole_or_refused(name: str) -> None:
    device = torch.device(name)
    assert take_memory(device, 1.0) is None
    assert memory_left(device) > 0
    with pytest.raises(InvalidField, match=rf"KNAPPER_GPU_MEMORY_SHARE is 0.5; allowed: 1 on {name}: .*Unset it"):
        take_memory(device, 0.5)
