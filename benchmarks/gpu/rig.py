"""The engine that is measured: started as `knapper up` starts it, over a store on this machine's disk."""

import asyncio
import contextlib
import gc
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.figures import Figure
from benchmarks.gpu.sizes import Sizes, write_model
from knapper.engine import hardware
from knapper.engine.executor import Work
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.models.base import Model
from knapper.engine.models.blocks import AttentionBlock
from knapper.engine.models.decoder import Decoder
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.ids import RunId
from knapper.jobs.run_client import Journal, RunClient
from knapper.serving import engine as serving
from knapper.state.journal.records import Spec
from knapper.wire.types import AdamW, Datum, ForwardBackward

T = TypeVar("T")
ADAM = AdamW(learning_rate=1e-4, grad_clip_norm=1.0)
_VOCABULARY = 250  # of the drawn tokens
_EFFECT = 0.01  # the size of an adapter's numbers: it changes the logits, and overflows nothing


@dataclass
class Rig:
    """`scratch`: a directory for model and store. `device`, `dtype`: as the settings have them."""

    sizes: Sizes
    device: str
    dtype: str
    scratch: Path

    @cached_property
    def device_now(self) -> torch.device:
        return hardware.device_for(self.device)

    def prepare(self) -> None:
        """The model's directory, and the settings in the environment, where the engine reads them."""
        directory = self.scratch / "model"
        if not directory.exists():
            write_model(directory, self.sizes.model, stored=self.sizes.stored)
        environment = {
            "KNAPPER_MODEL": self.sizes.name, "KNAPPER_MODEL_DIRECTORY": str(directory), "KNAPPER_DEVICE": self.device,
            "KNAPPER_DTYPE": self.dtype, "KNAPPER_DATA": str(self.scratch / "data"), "KNAPPER_LOG_LEVEL": "info",
        }  # fmt: skip
        os.environ.update(environment)

    @cached_property
    def engine(self) -> serving.ServingEngine:
        """Started; of a file that is all hole the weights are drawn on the device."""
        self.prepare()
        engine = serving.engine()
        if not self.sizes.stored:
            self.done(lambda: randomize(engine.trainer.decoder), engine)
        return engine

    @property
    def trainer(self) -> Trainer:
        return self.engine.trainer

    @property
    def model(self) -> Model:
        return self.trainer.decoder

    @cached_property
    def scheduler(self) -> TrainingScheduler:
        return TrainingScheduler(self.trainer, self.engine.executor, time.monotonic)

    def done(self, work: Callable[[], T], engine: serving.ServingEngine | None = None) -> T:
        """On the device's thread."""

        def once() -> Work[T]:
            yield from ()
            return work()

        return (engine or self.engine).executor.submit(once()).result()

    def run(self, awaitable: Callable[[], Awaitable[T]]) -> T:
        """On one event loop for the whole process: the engine's runs belong to it."""
        return self._loop.run_until_complete(awaitable())

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.new_event_loop()

    def state(self, seed: int = 0) -> RunState:
        """A run of the measured rank on every linear of a layer, whose B is not zero."""

        def make() -> RunState:
            state = self.trainer.create(spec(self.sizes.rank, seed))
            for _, _, b_OR in state.layout.matrices(state.weights_P):
                b_OR.normal_(std=_EFFECT)  # on the device: an 8B model's is large
            return state

        return self.done(make)

    def client(self, number: int) -> RunClient:
        """A new run of the engine, with operations in its journal."""
        services = self.engine.job_services
        journal = Journal(services.store, self.engine.runs, services.clock)

        async def free(_: int) -> None:
            return None

        async def create() -> RunClient:
            one = spec(self.sizes.rank, number, base_model=self.sizes.name)
            await journal.create(one)
            return RunClient(journal, RunId(one.run), 1, free)

        return self.run(create)

    def step(self, states: Sequence[RunState], data: Sequence[Sequence[Datum]]) -> list[RunState]:
        """forward_backward of every run, in shared passes, and an optimizer step of each."""
        futures = [
            self.scheduler.submit(state, partial(request, of_run, state.spec.run))
            for state, of_run in zip(states, data, strict=True)
        ]
        after = [future.result()[0] for future in futures]
        return [self.engine.executor.submit(self.trainer.optim_step(state, ADAM)).result()[0] for state in after]

    def sampler(self, adapters: Mapping[str, Lora], slots: int) -> EngineSampler:
        """The engine's sampler, with the engine's part of the memory, over adapters that are there."""
        account = self.engine.account
        return EngineSampler(
            self.model, self.engine.executor, Ready(adapters), None, slots_max=slots, kv_tokens_max=account.kv_tokens,
            now=time.monotonic, adapter_bytes_max=account.adapters, text_tokens_max=account.text_tokens_max,
        )  # fmt: skip

    def adapters(self, count: int) -> dict[str, Lora]:
        """Random ones, made on the device."""
        layout = self.trainer.layout(spec(self.sizes.rank, 0))
        dtype = torch.float32 if self.device_now.type == "cpu" else self.model.dtype

        def make() -> Lora:
            arena_P = torch.empty(layout.numel, device=self.device_now, dtype=dtype)
            return layout.lora(arena_P.normal_(std=_EFFECT), 1.0)

        return {f"adapter-{n}": self.done(make) for n in range(count)}

    def adapter(self, state: RunState) -> Lora:
        """As a sampler has it: on a GPU in the base's dtype."""
        dtype = torch.float32 if self.device_now.type == "cpu" else self.model.dtype
        return self.done(lambda: state.layout.lora(state.weights_P.to(dtype), state.scale))

    def synchronize(self) -> None:
        hardware.finish(self.device_now)

    def seconds(self, call: Callable[[], object]) -> float:
        self.synchronize()
        began = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - began

    def median_s(self, call: Callable[[], object], repeats: int = 0) -> float:
        """Of the repeats after one warm-up."""
        call()
        times = sorted(self.seconds(call) for _ in range(repeats or self.sizes.repeats))
        return times[len(times) // 2]

    @contextlib.contextmanager
    def peak(self) -> Iterator[Callable[[], str]]:
        """The most that torch held of the card since then, in words; nothing on a CPU."""
        gc.collect()
        hardware.release(self.device_now)
        on_gpu = self.device_now.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        yield lambda: f"peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_gpu else ""


@dataclass(frozen=True)
class Ready:
    """Adapters that are loaded."""

    adapters: Mapping[str, Lora]

    async def load(self, adapter: str) -> Lora:
        return self.adapters[adapter]


def spec(rank: int, seed: int, **changes: Any) -> Spec:
    values: dict[str, Any] = {
        "run": f"ses-{seed:032x}:train:0", "tenant": "local", "base_model": "m", "rank": rank, "alpha": 32.0,
        "seed": seed, "train_attn": True, "train_mlp": True, "train_unembed": False,
    }  # fmt: skip
    return Spec(**{**values, **changes})


def roughen(state: RunState) -> None:
    """B of a size that changes the logits: the same numbers on every device."""
    generator = torch.Generator().manual_seed(state.spec.seed)
    for _, _, b_OR in state.layout.matrices(state.weights_P):
        b_OR.copy_(torch.randn(b_OR.shape, generator=generator) * _EFFECT)


def texts(lengths: Sequence[int], seed: int) -> list[Datum]:
    """Random tokens, each trained on."""
    rng = np.random.default_rng(seed)
    return [
        Datum(
            rng.integers(0, _VOCABULARY, length).astype(np.int32),
            {"target_tokens": rng.integers(0, _VOCABULARY, length), "weights": np.ones(length, np.float32)},
        )
        for length in lengths
    ]


def prompts(count: int, length: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, _VOCABULARY, (count, length)).astype(np.int32))


def request(
    data: Sequence[Datum], run: str, loss: str = "cross_entropy", *, forward_only: bool = False
) -> ForwardBackward:
    return ForwardBackward(run, 1, list(data), loss, {}, forward_only)


@torch.inference_mode()
def randomize(model: Model) -> None:
    """Draws every weight of a native, dense model with attention in each layer, where it lies."""
    assert isinstance(model, Decoder)
    weights = model.weights
    for layer in weights.layers:
        for norm in (layer.mixer_input, layer.mixer_output, layer.mlp_input, layer.mlp_output):
            if norm is not None:
                norm.weight.fill_(1.0)
        assert isinstance(layer.mixer, AttentionBlock)
        for norm in (layer.mixer.q_norm, layer.mixer.k_norm):
            if norm is not None:
                norm.weight.fill_(1.0)
    weights.norm.weight.fill_(1.0)
    linears = [*(linear for layer in weights.layers for linear in layer.linears), weights.head]
    dense = [linear for linear in linears if isinstance(linear, FrozenLinear)]
    assert len(dense) == len(linears)
    matrices = [weights.embed, *(part for linear in dense for part in linear._parts)]
    for matrix_OI in matrices:
        matrix_OI.normal_(std=matrix_OI.shape[1] ** -0.5)


def rate(
    section: str, name: str, tokens: int, took_s: float, goal: str = "", stretch: str = "", note: str = ""
) -> Figure:
    """Tokens a second."""
    return Figure(section, name, tokens / took_s, None, "tok/s", None, goal, stretch, None, note)


def noted(*notes: str) -> str:
    return "; ".join(filter(None, notes))
