"""Checks of a model before its weights are read, with torch and transformers: device, memory, architecture.

An engine runs them before it loads. `knapper up` runs them in a process of its own if config.json leaves it open, so
that the server's process never holds torch: `python -m knapper.engine.models.preflight`, with settings from the
environment. It prints the reason and exits with REFUSED. Any other failure shows when the engine starts.
"""

import os
import sys
from pathlib import Path
from typing import Final

import torch

from knapper.engine import host_memory
from knapper.engine.hardware import device_for, memory_left, take_memory
from knapper.engine.layers.determinism import keep_bits_on_gpu
from knapper.engine.models import weight_files
from knapper.engine.models.loader import expect_architecture
from knapper.engine.models.spread import expect_spreadable
from knapper.errors import InvalidField, KnapperError, UserError, WaitsForMemory
from knapper.settings import Settings, variable
from knapper.text.sizes import sized

REFUSED: Final = 3
_LEAST_BYTES: Final = {"float32": 4, "bfloat16": 2, "auto": 2}  # bytes of a number, by KNAPPER_DTYPE


def expect_devices(settings: Settings) -> None:
    """Raises InvalidField for a number of devices over which this process cannot spread its model."""
    expect_spreadable(settings)
    if settings.devices > 1 and device_for(settings.device).type == "cuda":
        cards = torch.cuda.device_count()
        if settings.devices > cards:
            allowed = f"1 to {cards}, the GPUs that this process sees"
            raise InvalidField(variable("devices"), settings.devices, allowed)


def expect_device(settings: Settings) -> torch.device:
    """The device of the settings, with its memory capped at their share. Raises InvalidField."""
    expect_devices(settings)
    device = device_for(settings.device)
    if device.type != "cpu" and settings.batch_invariant == "true":
        keep_bits_on_gpu()
    shared_by = settings.engines if device.type == "cuda" else 1  # in equal parts: a card tells of nobody's plans
    take_memory(device, settings.gpu_memory_share / shared_by)
    return device


def expect_loadable(settings: Settings, device: torch.device, least_bytes: int | None = None, planned: int = 0) -> None:
    """Raises UnsupportedModel for a refused architecture, UserError for weights that do not fit, WaitsForMemory for
    those that do not fit beside the engines of other models.

    `least_bytes`: bytes of a number, once the dtype is known. `planned`: bytes that those engines will take.
    """
    directory = Path(settings.model_directory)
    expect_architecture(directory)
    if any(directory.glob("*.safetensors")):  # none before the download
        bytes_each = least_bytes or _LEAST_BYTES[settings.dtype]
        packs = device.type == "cpu" and settings.devices == 1
        needed = weight_files.unpacked_bytes(directory, bytes_each, kept_twice=packs)
        if device.type == "cuda":
            needed //= settings.devices  # a shard on each; what is gathered of them the account of memory counts
        _expect_memory(settings, device, needed, planned)


def _expect_memory(settings: Settings, device: torch.device, needed: int, planned: int) -> None:
    """A CPU's weights may go into swap, though slowly. Beyond that the kernel would kill this process, or another."""
    free = max(0, memory_left(device) - planned) + (host_memory.swap() if device.type == "cpu" else 0)
    if needed > free and settings.engines > 1 and device.type == "cpu":  # a GPU's parts do not grow
        raise WaitsForMemory(
            f"its weights take {sized(needed)}, and {sized(free)} of memory are free beside the other models' engines; "
            f"it goes on once one of those has been idle for {settings.idle_s:.0f} s (KNAPPER_IDLE_S)"
        )
    if needed > free:
        raise UserError(
            f"the weights of {settings.model} take {sized(needed)}, and {sized(free)} of memory are free on "
            f"{device.type}: free some, give the engine a larger machine, set KNAPPER_DTYPE=bfloat16 if it is float32, "
            "or serve a smaller model: `knapper models` lists some"
        )


def main() -> None:
    settings = Settings.load(os.environ)
    try:
        expect_loadable(settings, expect_device(settings))
    except KnapperError as error:
        print(" ".join(str(error).split()))
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
