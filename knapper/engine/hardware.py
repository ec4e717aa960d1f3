"""Which device computes, with how much of its memory, and in which dtype: decided here alone.

The account of memory: weights are loaded first. Of what they leave, keys and values of samples get a part, adapters
that samples use a smaller one, and the rest is for passes (activations, and a prompt's keys and values until its texts
have copies) and for the runs that train.
"""

import time
from collections.abc import Callable
from typing import Final

import structlog
import torch

from knapper.engine import host_memory
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.linear import FrozenLinear
from knapper.errors import InvalidField

_KV_PART: Final = 0.25  # of what the weights leave: so much is for keys and values
_KV_PART_MOST: Final = 0.75  # where one text of the whole context needs more
_ADAPTERS_PART: Final = 1 / 16  # of what the weights leave, for adapters that samples use
_ROWS, _WIDTH, _REPEATS = 128, 1024, 5  # of the products that dtypes are compared by: a millisecond or two each
_GFLOP: Final = 2e-9 * _ROWS * _WIDTH * _WIDTH
_SPEEDUP_MIN: Final = 1.3  # docs/decisions/0017

log = structlog.get_logger()


def device_for(setting: str) -> torch.device:
    """`auto`: cuda, else cpu; a Mac's GPU (mps) only where it is asked for: knapper was never run on one.

    Of several GPUs the first that CUDA_VISIBLE_DEVICES shows, by its index: torch caps no memory without one.
    Raises InvalidField for a device that this machine lacks.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, is_present in present.items() if is_present]
    automatic = "cuda" if present["cuda"] else "cpu"
    chosen = automatic if setting == "auto" else setting
    if chosen not in available:
        raise InvalidField("KNAPPER_DEVICE", setting, f"auto, {', '.join(available)} on this machine")
    return torch.device(chosen, 0) if chosen == "cuda" else torch.device(chosen)


def take_memory(device: torch.device, share: float) -> int | None:
    """The bytes that this process may take on a device with a memory of its own, else None; torch gives it no more.

    What CUDA itself takes, some hundred MB a process, is not among them. Raises InvalidField for a share of a memory
    that is not divided.
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
    """Bytes that this process can still take: of a GPU what its share and the card have left, else of the machine."""
    if device.type != "cuda":
        return host_memory.available()
    free_on_card, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    own = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return max(0, min(own, free_on_card + reserved) - allocated)


def kv_bytes(left: int, part: float, context_bytes: int) -> int:
    """For the keys and values of all texts that decode at once; `left` once the weights are there.

    `part` of that. 0: a quarter; and where one text that fills the context needs more, as much as it needs, up to three
    quarters.
    """
    if part > 0:
        return int(part * left)
    return max(int(_KV_PART * left), min(context_bytes, int(_KV_PART_MOST * left)))


def adapter_bytes(left: int) -> int:
    """For the adapters of samples that are kept, those in use among them; `left` once the weights are there."""
    return int(_ADAPTERS_PART * left)


def release(device: torch.device) -> None:
    """Give back what torch keeps of the device's memory for later: a pass needs it in other pieces."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def finish(device: torch.device) -> None:
    """Wait until the device has computed what it was given: what follows is then not charged for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def dtype_for(setting: str, device: torch.device, cpu_s: Callable[[], float] = time.thread_time) -> torch.dtype:
    """`auto`: bfloat16 where the hardware computes it faster than float32, else float32.

    `cpu_s`: seconds that this thread has computed.
    """
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "mps":
        return torch.float32  # not every Mac's GPU computes bfloat16, and none was measured
    return _faster_on_this_cpu(cpu_s)


def _faster_on_this_cpu(cpu_s: Callable[[], float]) -> torch.dtype:
    """bfloat16 if it is faster by so much that no other start on this machine finds otherwise.

    Measured, because no flag tells: of two CPUs with avx512_bf16 one computes it twice as fast as float32, and the
    other slower. On one thread and in its own time, to which whoever else computes on the machine adds nothing.
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
    """The least that a linear took, by dtype; in turns, as the engine computes one."""
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
            if repeat > 0:  # in the first one, oneDNN makes its kernels
                least_s[linear.dtype] = min(least_s[linear.dtype], took_s)
    return least_s
