"""Opens the vLLM sampler of this process's settings, ready to sample."""

import atexit
import math
import time
from collections.abc import MutableMapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

import structlog
import torch
from tokenizers import Tokenizer

from knapper import limits
from knapper.catalogue import servable
from knapper.concurrency import shutdown
from knapper.concurrency.retry import Attempts
from knapper.engine import host_memory, memory
from knapper.engine.hardware import dtype_for
from knapper.engine.models.config import ModelConfig, bounded_context
from knapper.engine.sampling.kv_cache import bytes_per_token
from knapper.errors import InvalidField
from knapper.observability.metrics import Reading, Readings
from knapper.settings import Settings
from knapper.store import Store
from knapper.vllm.adapters import AdapterFiles, refusal
from knapper.vllm.core import Core, Options
from knapper.vllm.device_time import DeviceTime
from knapper.vllm.engine import CoreLifecycle, Neighbour
from knapper.vllm.fair_queue import SlotQueue
from knapper.vllm.sampler import VllmSampler

_SEQUENCES_MAX: Final = {"cpu": 64, "cuda": 256}  # sequences that decode at once
_GIB: Final = 1024 * limits.MIB  # the unit of vLLM's KV cache on a CPU
_GPU_PASSES: Final = 3 * _GIB  # what passes, logits and CUDA graphs take at most of models of this size
_BLOCK: Final = 128  # positions in a block of the KV cache there

log = structlog.get_logger()


def open_sampler(
    settings: Settings, store: Store, environ: MutableMapping[str, str], neighbour: Neighbour | None = None
) -> tuple[VllmSampler, int, str]:
    """(the sampler, the context in tokens, the dtype). Blocks until it can sample, or vLLM did not start. `neighbour`:
    of this process on the same card.

    Raises UnsupportedModel for an architecture outside of the native registry, whose target modules are unknown,
    InvalidField for a checkpoint of which the text part alone is served, a mixture of experts, and layers with states.
    """
    began = time.monotonic()
    directory = Path(settings.model_directory)
    facts = ModelConfig.read(directory)
    facts = replace(facts, context=bounded_context(facts.context, settings.context))
    servable.expect_sampled_by_vllm(directory, str(directory))
    device = device_for(settings.device, "cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype_for(settings.dtype, torch.device(device))
    kv_bytes = 0  # on a GPU KNAPPER_VLLM_MEMORY decides
    if device == "cpu":
        left = max(0, host_memory.available() - _weights(directory, dtype))
        kv_bytes, fits = on_cpu(facts, dtype, left, settings.kv_memory)
    else:
        expect_divisible(facts, settings)
        cards = settings.devices * int(settings.vllm_memory * torch.cuda.get_device_properties(0).total_memory)
        fits = on_gpu(facts, dtype, cards - _weights(directory, dtype), settings.vllm_adapters, settings.vllm_rank)
    facts = replace(facts, context=fitting(facts.context, fits, settings))
    options = Options(
        directory=directory,
        dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
        context=facts.context,
        sequences_max=_SEQUENCES_MAX[device],
        rank_max=settings.vllm_rank,
        adapters_at_once=settings.vllm_adapters,
        adapters_kept=limits.adapters_cached_max,
        device=device,
        memory=settings.vllm_memory,
        kv_bytes=kv_bytes,
        threads=settings.threads,
        sleeps=device == "cuda" and settings.vllm_idle_s > 0,
        devices=settings.devices if device == "cuda" else 1,
    )
    attempts = Attempts(f"model {settings.model}", time.monotonic)
    engine = CoreLifecycle(lambda: Core.start(options, environ), settings.vllm_idle_s, attempts, neighbour)
    refuse = partial(refusal, rank_max=settings.vllm_rank)
    adapters = AdapterFiles(store, facts, settings.vllm_adapter_directory, engine.forget, refuse, dtype)
    atexit.register(adapters.close)
    atexit.register(engine.close)
    shutdown.before(engine.shut_down)
    engine.begin()
    slots = SlotQueue(options.sequences_max, options.adapters_at_once)
    tokenizer, device_time = Tokenizer.from_file(str(directory / "tokenizer.json")), DeviceTime(time.monotonic)
    sampler = VllmSampler(engine, adapters, facts, tokenizer, slots, device_time)
    log.info(
        "vllm: ready", model=settings.model, context=facts.context, device=device, dtype=options.dtype,
        took_s=round(time.monotonic() - began, 2),
    )  # fmt: skip
    Readings(_readings(sampler, engine, device_time, options.sequences_max))
    return sampler, facts.context, options.dtype


def expect_divisible(facts: ModelConfig, settings: Settings) -> None:
    """Raises InvalidField for a number of devices that vLLM cannot divide the attention heads by."""
    heads = math.gcd(*(mixer.heads for mixer in facts.attention))
    if heads % settings.devices:
        allowed = f"a divisor of {heads}, the model's attention heads, where vLLM samples"
        raise InvalidField("KNAPPER_DEVICES", settings.devices, allowed)


def on_cpu(facts: ModelConfig, dtype: torch.dtype, left: int, part: float) -> tuple[int, int]:
    """(bytes of the KV cache, tokens of the longest sequence) on a CPU with `left` bytes of memory beside the weights.

    `part` as in memory.kv_bytes. vLLM takes whole GiB, at least one, and starts only if they hold a sequence of the
    context.
    """
    token_bytes = bytes_per_token(facts, dtype)
    longest_bytes = (facts.context + -facts.context % _BLOCK) * token_bytes
    most_bytes = _SEQUENCES_MAX["cpu"] * longest_bytes  # vLLM takes all at once, used or not
    kv = min(memory.kv_bytes(left, part, _whole(longest_bytes)), _whole(most_bytes)) // _GIB * _GIB
    return max(_GIB, kv), min(facts.context, max(_GIB, kv) // (_BLOCK * token_bytes) * _BLOCK)


def on_gpu(facts: ModelConfig, dtype: torch.dtype, left: int, adapters: int, rank: int) -> int:
    """Tokens of the longest sequence on a GPU that has `left` bytes for vLLM beside its weights.

    An estimate: vLLM measures what its passes and graphs take when it starts.
    """
    of_adapters = adapters * dtype.itemsize * sum(target.numel(rank) for target in facts.lora_targets)
    free = max(0, left - of_adapters - _GPU_PASSES)
    return min(facts.context, free // (_BLOCK * bytes_per_token(facts, dtype)) * _BLOCK)


def fitting(context: int, fits: int, settings: Settings) -> int:
    """Tokens of context that are served, where `fits` have room. Raises InvalidField for next to none, and for fewer
    than were asked for.
    """
    todo = "Lower KNAPPER_CONTEXT, or give the sampler more memory (KNAPPER_KV_MEMORY on a CPU, KNAPPER_VLLM_MEMORY)"
    if fits < min(_BLOCK, context):
        raise InvalidField("KNAPPER_VLLM_MEMORY", settings.vllm_memory, "what holds the weights and a text", todo)
    if fits < context and settings.context:
        raise InvalidField("KNAPPER_CONTEXT", settings.context, f"up to {fits}, for which vLLM has memory", todo)
    if fits < context:
        log.warning(
            "vllm: not even one text of the whole context fits: longer ones are refused",
            tokens=fits, context=context, todo=todo,
        )  # fmt: skip
    return min(fits, context)


def _whole(count: int) -> int:
    return count + -count % _GIB


def _weights(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of vLLM's weights: in float32 they may take twice the bytes of their files."""
    files = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return files * (2 if dtype == torch.float32 else 1)


def device_for(setting: str, present: Literal["cuda", "cpu"]) -> Literal["cuda", "cpu"]:
    """vLLM is built for one kind of device, `present`. Raises InvalidField if the setting is another."""
    if setting not in ("auto", present):
        allowed = f"auto or {present} with KNAPPER_SAMPLER=vllm: this environment's vLLM computes nowhere else"
        raise InvalidField("KNAPPER_DEVICE", setting, allowed)
    return present


def _readings(
    sampler: VllmSampler, engine: CoreLifecycle, device_time: DeviceTime, sequences_max: int
) -> list[Reading]:
    counts = sampler.counters
    return [
        Reading("knapper_vllm_prefilled_tokens", "Prompt tokens, cached ones included.",
                lambda: counts.prefilled_tokens, counts=True),
        Reading("knapper_vllm_sampled_tokens", "Tokens sampled.", lambda: counts.decoded_tokens, counts=True),
        Reading("knapper_vllm_device_seconds", "Seconds with any active sequence.", lambda: device_time.device_s,
                counts=True),
        Reading("knapper_vllm_slots", "Sequences that decode now.", lambda: sampler.active),
        Reading("knapper_vllm_slots_max", "Sequences that can decode at once.", lambda: sequences_max),
        Reading("knapper_vllm_starts", "Engine cores started.", lambda: engine.starts, counts=True),
        Reading("knapper_vllm_sleeping", "1 while the core has released its memory.", lambda: engine.released),
    ]  # fmt: skip
