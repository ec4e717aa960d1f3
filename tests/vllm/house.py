"""A vLLM sampler over a tiny model, as the sample function has one, with adapters in a store in memory."""

import asyncio
import os
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tokenizers import Tokenizer

from knapper.engine import checkpoint_format
from knapper.engine.layers.lora import layout
from knapper.engine.models.config import ModelConfig
from knapper.engine.training.optimizer import Moments
from knapper.engine.training.trainer import RunState
from knapper.state.journal import bundles
from knapper.state.journal.records import Spec
from knapper.store.memory import MemoryStore
from knapper.vllm.adapters import AdapterFiles, refusal
from knapper.vllm.core import Core, Options
from knapper.vllm.device_time import DeviceTime
from knapper.vllm.engine import CoreLifecycle
from knapper.vllm.fair_queue import SlotQueue
from knapper.vllm.sampler import VllmSampler
from knapper.wire.types import SampleOutput, SampleRequest

T = TypeVar("T")


def adapter_state(facts: ModelConfig, spec: Spec, *, spread: float = 0.1) -> RunState:
    """A run with random weights everywhere, as if it had been trained."""
    where = layout(facts, spec)
    generator = torch.Generator().manual_seed(spec.seed)
    weights_P = torch.randn(where.numel, generator=generator) * spread
    return RunState(spec, where, weights_P, Moments(torch.zeros_like(weights_P), torch.zeros_like(weights_P), 0))


class House:
    """`run` and `within` use one event loop: the core is bound to it."""

    def __init__(
        self,
        model: Path,
        memory: Path,
        *,
        rest_s: float = 0.0,
        sequences_max: int = 16,
        rank_max: int = 16,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        self.model, self.memory = model, memory
        self.facts = ModelConfig.read(model)
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.store = MemoryStore()
        self.loop = asyncio.Runner()
        options = Options(
            directory=model, dtype=dtype, context=self.facts.context, sequences_max=sequences_max, rank_max=rank_max,
            adapters_at_once=2, adapters_kept=4, device="cpu", memory=0.9, kv_bytes=2**30, threads=1, sleeps=False,
        )  # fmt: skip
        self.engine = CoreLifecycle(lambda: Core.start(options, os.environ), rest_s)
        self.adapters = AdapterFiles(
            self.store, self.facts, memory, self.engine.forget, lambda spec: refusal(spec, rank_max),
            torch.bfloat16 if dtype == "bfloat16" else torch.float32,
        )  # fmt: skip
        self.slots = SlotQueue(sequences_max, options.adapters_at_once)
        self.device_time = DeviceTime(time.monotonic)
        self.sampler = VllmSampler(self.engine, self.adapters, self.facts, self.tokenizer, self.slots, self.device_time)

    def run(self, *requests: SampleRequest) -> list[SampleOutput]:
        async def together() -> list[SampleOutput]:
            return list(await asyncio.gather(*(self.sampler.sample(request) for request in requests)))

        return self.within(together())

    def within(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(asyncio.wait_for(work, 110))

    def save(self, name: str, **fields: Any) -> RunState:
        """An adapter in the store, at `adapters/<name>/1/`."""
        known: dict[str, Any] = {
            "run": name, "tenant": "local", "base_model": "tiny", "rank": 4, "alpha": 8.0, "seed": 1,
            "train_attn": True, "train_mlp": True, "train_unembed": True,
        }  # fmt: skip
        spread = fields.pop("spread", 0.1)
        state = adapter_state(self.facts, Spec(**{**known, **fields}), spread=spread)
        files = checkpoint_format.export(state, with_optimizer=False)
        asyncio.run(bundles.write(self.store, bundle(name), files, spec=state.spec, seq=1, epoch=1))
        return state

    def close(self) -> None:
        self.engine.close()
        self.adapters.close()
        self.loop.close()


def bundle(name: str) -> str:
    return f"adapters/{name}/1/"
