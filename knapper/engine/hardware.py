"""Which device computes, and in which dtype: decided here alone."""

import torch

from knapper.errors import InvalidField


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
