"""Which sampler this process takes, and how it and training divide a GPU: decided once, and said in one line.

With `KNAPPER_SAMPLER=auto` vLLM samples on a GPU wherever it can, and the engine's own sampler everywhere else.
"""

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import structlog

from knapper.catalogue import servable
from knapper.errors import InvalidField
from knapper.settings import Settings, variable

_HALF: Final = 0.45  # of a card, for training, where nobody says more
_BETWEEN: Final = 0.05  # of a card: what CUDA takes for two processes beyond their parts
_ALONE: Final = 0.9  # of a card, for vLLM without a neighbour
_VLLM_LEAST: Final = 0.1
_IDLE_S: Final = 10.0  # longer than the pauses within a batch of samples, shorter than training steps are worth
_NVIDIA: Final = Path("/proc/driver/nvidia")

log = structlog.get_logger()


class ChosenSampler(NamedTuple):
    """`name`: torch or vllm. `reason`: why, in words."""

    name: str
    reason: str


@cache
def settings() -> Settings:
    """This process's settings, with the sampler that it takes and its parts of a GPU in the place of `auto`.

    Raises UserError for a sampler that is chosen by name and cannot be, and for parts that are more than a card.
    """
    loaded = Settings.load(os.environ)
    sampler = chosen(loaded)
    loaded = divided(msgspec.structs.replace(loaded, sampler=sampler.name), os.environ)
    parts = {}
    if sampler.name == "vllm" and loaded.vllm_memory:
        parts = {"training": f"{loaded.gpu_memory_share:.0%} of the card", "sampling": f"{loaded.vllm_memory:.0%}"}
    # Without a GPU there was nothing to choose, and people's terminals have few lines.
    say = log.info if _NVIDIA.exists() or loaded.sampler == "vllm" else log.debug
    say("sampler", sampler=sampler.name, reason=sampler.reason, **parts)
    return loaded


def chosen(settings: Settings) -> ChosenSampler:
    """What is asked last takes longest: torch is imported only where vLLM is installed."""
    if settings.sampler != "auto":
        if settings.sampler == "vllm":
            servable.expect_vllm()
        return ChosenSampler(settings.sampler, f"KNAPPER_SAMPLER={settings.sampler}")
    if reason := _torch_without_asking(settings) or _torch_by_card(settings):
        return ChosenSampler("torch", reason)
    return ChosenSampler("vllm", f"a GPU, and vLLM {servable.vllm_version().installed}")


def _torch_without_asking(settings: Settings) -> str:
    """Why the engine's own sampler is taken, whatever the card; empty if it is the card's to say."""
    if settings.device in ("cpu", "mps"):
        return f"KNAPPER_DEVICE={settings.device}"
    version = servable.vllm_version()
    if not version.installed:
        return "vLLM is not installed"
    if not version.supported:
        return f"vLLM {version.installed} is installed, which is not {servable.VLLM_RELEASE}"
    if settings.engines > 1:
        return f"{settings.engines} base models share the machine"
    lacks = servable.not_sampled_by_vllm(Path(settings.model_directory), settings.model)
    return f"vLLM does not sample {lacks}" if lacks else ""


def _torch_by_card(settings: Settings) -> str:
    from knapper.engine import hardware

    device = hardware.device_for(settings.device)
    if device.type != "cuda":
        return hardware.why_no_cuda() or "no GPU"
    if not hardware.has_bfloat16():
        return f"{hardware.name_of(device)} has no bfloat16"
    return ""


def divided(settings: Settings, environ: Mapping[str, str]) -> Settings:
    """The settings, with the parts of a GPU that training and vLLM have.

    `KNAPPER_GPU_MEMORY_SHARE` is training's, and vLLM has the rest, where both use one card: in one process, or on one
    machine outside of a cluster. A pod of vLLM's alone has its card alone, unless the share says otherwise.
    """
    if settings.sampler != "vllm" or not _on_gpu(settings):
        return settings
    together = "K_SERVICE" not in environ or _trains_too(environ)
    share = _HALF if together and settings.gpu_memory_share == 1 else settings.gpu_memory_share
    left = round(1 - share, 2) if share < 1 else 1.0
    memory = settings.vllm_memory or (round(left - _BETWEEN, 2) if share < 1 else _ALONE)
    if memory < _VLLM_LEAST:
        allowed = f"up to {1 - _VLLM_LEAST - _BETWEEN:.2f} where vLLM samples on the same card"
        raise InvalidField("KNAPPER_GPU_MEMORY_SHARE", settings.gpu_memory_share, allowed)
    if memory > left:
        allowed = f"up to {left:g}, which training leaves of the card (KNAPPER_GPU_MEMORY_SHARE is {share:g})"
        raise InvalidField("KNAPPER_VLLM_MEMORY", memory, allowed, "Unset it, or lower KNAPPER_GPU_MEMORY_SHARE")
    # In one process training has vLLM's memory while that sleeps (knapper.serving.lent_memory): worth it by default.
    unset = variable("vllm_idle_s") not in environ and _trains_too(environ)
    idle_s = _IDLE_S if unset else settings.vllm_idle_s
    return msgspec.structs.replace(settings, gpu_memory_share=share, vllm_memory=memory, vllm_idle_s=idle_s)


def _trains_too(environ: Mapping[str, str]) -> bool:
    functions = [Path(source).parent.name for source in environ.get("FUNCTION_SOURCES", "").split(os.pathsep)]
    return "train_step" in functions


def _on_gpu(settings: Settings) -> bool:
    from knapper.engine import hardware

    return settings.device != "cpu" and hardware.device_for(settings.device).type == "cuda"
