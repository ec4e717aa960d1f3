"""Which device computes, with how much of its memory, and in which dtype: decided here alone."""

from typing import Final

import torch

from knapper.errors import InvalidField

_KV_PART: Final = 4  # of the memory that weights leave, keys and values take 1 / so much: the rest is for passes


def device_for(setting: str) -> torch.device:
    """`auto`: cuda, else cpu; a Mac's GPU (mps) only where it is asked for: knapper was never run on one.

    Raises InvalidField for a device that this machine lacks.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    able = [name for name, there in present.items() if there]
    if setting == "auto":
        return torch.device("cuda" if present["cuda"] else "cpu")
    if setting not in able:
        raise InvalidField("KNAPPER_DEVICE", setting, f"auto, {', '.join(able)} on this machine")
    return torch.device(setting)


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
    torch.cuda.set_per_process_memory_fraction(share, device)
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def kv_bytes(device: torch.device, memory: int | None, most: int) -> int:
    """For keys and values, once the weights are there: a part of what these left of `memory`, `most` at most."""
    if memory is None:
        return most
    return min(most, max(0, memory - torch.cuda.memory_allocated(device)) // _KV_PART)


def finish(device: torch.device) -> None:
    """Wait until the device has computed what it was given: what follows is then not charged for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def dtype_for(setting: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the hardware computes it faster than float32, else float32."""
    if setting != "auto":
        return torch.bfloat16 if setting == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "mps":
        return torch.float32  # not every Mac's GPU computes bfloat16, and none was measured
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32
