"""A vLLM sampler as this process's settings want it, ready when it is returned."""

import atexit
import time
from collections.abc import MutableMapping
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import torch
from tokenizers import Tokenizer

from knapper import limits
from knapper.engine.config import ModelConfig
from knapper.engine.hardware import dtype_for
from knapper.metrics import Reading, Readings
from knapper.settings import Settings
from knapper.store import Store
from knapper.vllm import shapes
from knapper.vllm.adapters import Shelf
from knapper.vllm.core import Core, Options
from knapper.vllm.engine import Engine
from knapper.vllm.sampler import VllmSampler
from knapper.vllm.shares import Shares
from knapper.vllm.turns import Turns

_TEXTS_MAX: Final = {"cpu": 64, "cuda": 256}  # that decode at once
_KV_BYTES: Final = 2 * 1024 * limits.MIB  # keys and values on a CPU; on a GPU what KNAPPER_VLLM_MEMORY leaves

log = structlog.get_logger()


def open_sampler(settings: Settings, store: Store, environ: MutableMapping[str, str]) -> tuple[VllmSampler, int]:
    """(the sampler, the tokens of the model's context). Blocks until it can sample.

    Raises UnsupportedModel for an architecture of which knapper does not know where adapters go, Unavailable if vLLM
    does not start.
    """
    began = time.monotonic()
    directory = Path(settings.model_directory)
    facts = ModelConfig.read(directory)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options = Options(
        directory=directory,
        dtype="bfloat16" if dtype_for(settings.dtype, where) == torch.bfloat16 else "float32",
        context=facts.context,
        texts_max=_TEXTS_MAX[where.type],
        rank_max=settings.vllm_rank,
        adapters_at_once=settings.vllm_adapters,
        adapters_kept=limits.adapters_kept_max,
        device="cuda" if where.type == "cuda" else "cpu",
        memory=settings.vllm_memory,
        kv_bytes=_KV_BYTES,
        threads=settings.threads,
        sleeps=where.type == "cuda" and settings.vllm_rest_s > 0,
    )
    engine = Engine(lambda: Core.start(options, environ), settings.vllm_rest_s)
    refuse = partial(shapes.refusal, rank_max=settings.vllm_rank)
    shelf = Shelf(store, facts, settings.vllm_shelf, engine.forget, refuse)
    atexit.register(shelf.close)
    engine.begin()
    atexit.register(engine.close)
    turns = Turns(options.texts_max, options.adapters_at_once)
    tokenizer, shares = Tokenizer.from_file(str(directory / "tokenizer.json")), Shares(time.monotonic)
    sampler = VllmSampler(engine, shelf, facts, tokenizer, turns, shares)
    log.info(
        "vllm: ready", model=settings.model, context=facts.context, device=where.type, dtype=options.dtype,
        took_s=round(time.monotonic() - began, 2),
    )  # fmt: skip
    Readings(_readings(sampler, engine, shares, options.texts_max))
    return sampler, facts.context


def _readings(sampler: VllmSampler, engine: Engine, shares: Shares, texts_max: int) -> list[Reading]:
    counts = sampler.counters
    return [
        Reading("knapper_vllm_prefilled_tokens", "Prompt tokens, those that were in the cache too.",
                lambda: counts.prefilled_tokens, counts=True),
        Reading("knapper_vllm_sampled_tokens", "Tokens sampled.", lambda: counts.decoded_tokens, counts=True),
        Reading("knapper_vllm_device_seconds", "Seconds in which a text was under way.", lambda: shares.device_s,
                counts=True),
        Reading("knapper_vllm_slots", "Texts that decode now.", lambda: sampler.active),
        Reading("knapper_vllm_slots_max", "Texts that can decode at once.", lambda: texts_max),
        Reading("knapper_vllm_starts", "Engine cores that were started.", lambda: engine.starts, counts=True),
        Reading("knapper_vllm_resting", "1 while the core has given its memory back.", lambda: engine.resting),
    ]  # fmt: skip
