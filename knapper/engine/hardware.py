"""The choice of device and dtype, and what a device has of memory; no other module asks. `memory` divides it."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog
import torch

from knapper.engine import host_memory
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.linear import FrozenLinear
from knapper.errors import InvalidField

_ROWS, _WIDTH, _REPEATS = 128, 1024, 5  # of the products that compare dtypes: a millisecond or two each
_GFLOP: Final = 2e-9 * _ROWS * _WIDTH * _WIDTH
_SPEEDUP_MIN: Final = 1.3  # docs/decisions/0017

log = structlog.get_logger()


def device_for(setting: str) -> torch.device:
    """`auto`: cuda, else cpu. A Mac's GPU (mps) only by name: knapper was never run on one.

    Of several GPUs the first of CUDA_VISIBLE_DEVICES, with its index: torch caps no memory without one. Raises
    InvalidField for a device that this machine lacks.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, is_present in present.items() if is_present]
    automatic = "cuda" if present["cuda"] else "cpu"
    chosen = automatic if setting == "auto" else setting
    if chosen not in available:
        todo = why_no_cuda() if chosen == "cuda" else ""
        raise InvalidField("KNAPPER_DEVICE", setting, f"auto, {', '.join(available)} on this machine", todo)
    if setting == "auto" and (reason := why_no_cuda()):
        log.warning("KNAPPER_DEVICE is auto, and no GPU computes", device=chosen, reason=reason)
    return torch.device(chosen, 0) if chosen == "cuda" else torch.device(chosen)


def device_of_rank(setting: str, rank: int, share: float) -> torch.device:
    """The device of a rank of several, its memory capped as rank 0's is. Raises InvalidField as `device_for` does."""
    device = device_for(setting)
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    take_memory(device, share)
    return device


def why_no_cuda(driver: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Why torch does not use this machine's NVIDIA GPU, in words; empty if it does, or there is none.

    `driver`: the file in which the kernel's module says its version.
    """
    if torch.cuda.is_available() or not driver.is_file():
        return ""
    found = re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", driver.read_text(errors="replace"))
    said = f"the NVIDIA driver {found[1]}" if found else "an NVIDIA driver"
    if torch.version.cuda is None:
        return f"{said} is here, and this torch ({torch.__version__}) is built for a CPU: install torch for CUDA"
    return (
        f"torch is built for CUDA {torch.version.cuda} and cannot use {said}: it is too old, or the GPU is not given "
        "to this process; update the driver, or install a torch for an older CUDA"
    )


def has_bfloat16() -> bool:
    """Whether the cuda device computes it, rather than emulates it."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def name_of(device: torch.device) -> str:
    """The model of a cuda device."""
    return str(torch.cuda.get_device_name(device))


def take_memory(device: torch.device, share: float) -> int | None:
    """Cap this process's memory on a device with memory of its own, and return the cap in bytes; else None.

    CUDA itself takes some hundred MB a process beyond it. Raises InvalidField for a share of memory that cannot be
    capped.
    """
    if device.type != "cuda":
        if share != 1:
            raise InvalidField(
                "KNAPPER_GPU_MEMORY_SHARE", share, f"1 on {device.type}: only a cuda device's memory can be capped",
                "Unset it, or set KNAPPER_DEVICE=cuda",
            )  # fmt: skip
        return None
    torch.cuda.set_per_process_memory_fraction(float(share), device)
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def memory_left(device: torch.device) -> int:
    """Bytes that this process can still allocate on the device, or on the machine if it has no memory of its own."""
    if device.type != "cuda":
        return host_memory.available()
    free_on_card, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    cap = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(cap, free_on_card + reserved) - allocated)


def release(device: torch.device) -> None:
    """Return torch's cached device memory: a pass needs it in other sizes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def finish(device: torch.device) -> None:
    """Wait until the device has done its queued work, so that later work is not charged for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def dtype_for(setting: str, device: torch.device, cpu_s: Callable[[], float] = time.thread_time) -> torch.dtype:
    """`auto`: bfloat16 where the hardware computes it faster than float32, else float32.

    `cpu_s`: CPU seconds of this thread. Raises InvalidField for bfloat16 on a GPU that only emulates it.
    """
    if setting == "bfloat16" and device.type == "cuda" and not has_bfloat16():
        allowed = f"auto or float32 on {name_of(device)}, which has no bfloat16 and would emulate it"
        raise InvalidField("KNAPPER_DTYPE", setting, allowed)
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if has_bfloat16() else torch.float32
    if device.type == "mps":
        return torch.float32  # not every Mac's GPU computes bfloat16, and none was measured
    return _faster_on_this_cpu(cpu_s)


def _faster_on_this_cpu(cpu_s: Callable[[], float]) -> torch.dtype:
    """bfloat16 if it is faster by a margin that every start on this machine reproduces.

    Measured, because no flag says it: of two CPUs with avx512_bf16 one computes it twice as fast as float32, the other
    slower. On one thread and by CPU time, which other processes do not add to.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        took_s = _product_seconds(cpu_s)
    finally:
        torch.set_num_threads(threads)
    ratio = took_s[torch.float32] / took_s[torch.bfloat16]
    chosen = torch.bfloat16 if ratio >= _SPEEDUP_MIN else torch.float32
    log.info(
        "KNAPPER_DTYPE is auto: measured on this CPU",
        dtype=str(chosen).removeprefix("torch."),
        reason=f"bfloat16 products are {ratio:.2f} times as fast as float32's; it is taken from {_SPEEDUP_MIN} on",
        gflops={str(dtype).removeprefix("torch."): round(_GFLOP / product_s) for dtype, product_s in took_s.items()},
    )
    return chosen


def _product_seconds(cpu_s: Callable[[], float]) -> dict[torch.dtype, float]:
    """The shortest time of a linear by dtype, measured in turns."""
    w = torch.linspace(-1, 1, _WIDTH * _WIDTH).view(_WIDTH, _WIDTH)
    raw = Exactness(promised=False)
    linears = [FrozenLinear([w.to(dtype)], dtype, exactness=raw) for dtype in (torch.float32, torch.bfloat16)]
    least_s = {linear.dtype: float("inf") for linear in linears}
    for repeat in range(1 + _REPEATS):
        for linear in linears:
            x = w[:_ROWS].to(linear.dtype)
            began = cpu_s()
            linear(x)
            took_s = cpu_s() - began
            if repeat > 0:  # oneDNN builds its kernels in the first one
                least_s[linear.dtype] = min(least_s[linear.dtype], took_s)
    return least_s
