"""The engine's phases on the card that is none: its own classes, on its own thread, under a meter."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from knapper.engine import memory
from knapper.engine.executor import Executor, Work
from knapper.engine.layers.lora import Lora
from knapper.engine.models.decoder import Decoder
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.wire.types import AdamW, SampleRequest, SamplingParams
from tests.engine.gate.meter import Counts, MadeOnHost, Meter
from tests.engine.gate.models import META, meta_decoder
from tests.engine.runs import datum, request, spec

T = TypeVar("T")
Prompt = NDArray[np.int32]
_VOCABULARY: Final = 1000
_WAIT_S: Final = 300


@dataclass
class Bench:
    """A model at its true size. Everything that it computes is computed on the executor's thread, under the meter."""

    decoder: Decoder
    executor: Executor
    meter: Meter
    adapters: dict[str, Lora] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Of every run and adapter."""
        return memory.expected_rank(self.decoder.config)

    def do(self, work: Callable[[], T]) -> T:
        def once() -> Work[T]:
            yield from ()
            return work()

        return self.executor.submit(once()).result(_WAIT_S)

    def train(self, lengths: Sequence[Sequence[int]], rows_max: int) -> Counts:
        """One pass, forward and backward, of several runs, each with texts of these lengths: PPO, every linear and the
        head adapted.
        """
        trainer = Trainer(self.decoder, rows_max)
        states = [self._state(trainer) for _ in lengths]
        requests = [request(_data(of_run), "ppo") for of_run in lengths]
        scheduler = TrainingScheduler(trainer, self.executor, time.monotonic)
        with self._held() as go:
            futures = [
                scheduler.submit(state, lambda one=one: one)  # type: ignore[misc]  # a default binds it
                for state, one in zip(states, requests, strict=True)
            ]
            go()
        for future in futures:
            future.result(_WAIT_S)
        assert scheduler.counters.passes == 1, "the runs shared no pass"
        return self.meter.counts

    def optimize(self) -> Counts:
        """A step of AdamW with pending gradients and clipping."""
        trainer = Trainer(self.decoder)
        state = self._state(trainer)
        ready = RunState(state.spec, state.layout, state.weights_P, state.moments, self._arena(trainer))
        values = AdamW(learning_rate=1e-3, grad_clip_norm=1.0)
        self.do(self.meter.begin)
        self.executor.submit(trainer.optim_step(ready, values)).result(_WAIT_S)
        return self.meter.counts

    def sample(
        self, texts: Sequence[tuple[Prompt, str]], kv_tokens: int, **params: Any
    ) -> tuple[list[Counts], list[Counts]]:
        """Of the texts (prompt, adapter), together: the counts of each pass over prompts, and of each decoding step."""
        sampler = EngineSampler(
            self.decoder, self.executor, _Adapters(self), None, slots_max=64, kv_tokens_max=kv_tokens,
            now=time.monotonic, adapter_bytes_max=1 << 40,
        )  # fmt: skip
        passes: list[Counts] = []
        steps: list[Counts] = []

        def counted(function: Callable[..., T], seen: list[Counts]) -> Callable[..., T]:
            def call(*args: Any) -> T:
                seen.append(self.meter.begin())
                return function(*args)

            return call

        scheduler = sampler._scheduler
        monkey = pytest.MonkeyPatch()  # of this sampler alone, which ends here
        monkey.setattr(scheduler, "_step", counted(scheduler._step, steps))
        monkey.setattr(scheduler._prefiller, "compute", counted(scheduler._prefiller.compute, passes))

        async def together() -> None:
            with self._held() as go:
                tasks = [
                    asyncio.ensure_future(
                        sampler.sample(
                            SampleRequest("", adapter, prompt, SamplingParams(**params), num_samples=1, seed=n)
                        )
                    )
                    for n, (prompt, adapter) in enumerate(texts)
                ]
                while sampler.waiting < len(texts) and not any(task.done() for task in tasks):  # noqa: ASYNC110  there is
                    await asyncio.sleep(0)  # no event to wait for: they need nothing but their turns on this loop
                go()
            await asyncio.gather(*tasks)

        asyncio.run(asyncio.wait_for(together(), _WAIT_S))
        return passes, steps

    def _state(self, trainer: Trainer) -> RunState:
        one = spec(rank=self.rank, alpha=32.0, train_unembed=True)
        return self.do(lambda: trainer.begin(one, self._arena_of(trainer)))

    def _arena(self, trainer: Trainer) -> torch.Tensor:
        return self.do(lambda: self._arena_of(trainer))

    def _arena_of(self, trainer: Trainer) -> torch.Tensor:
        return torch.empty(trainer.layout(spec(rank=self.rank, train_unembed=True)).numel, device=META)

    def lora(self, adapter: str) -> Lora:
        """In the base's dtype, as a sampler on a GPU has it."""
        if adapter not in self.adapters:
            layout = Trainer(self.decoder).layout(spec(rank=self.rank, train_unembed=True))
            self.adapters[adapter] = self.do(
                lambda: layout.lora(torch.empty(layout.numel, dtype=self.decoder.dtype, device=META), 1.0)
            )
        return self.adapters[adapter]

    def forget(self) -> None:
        """Let go of what earlier phases hold: adapters, and what only a cycle keeps alive."""
        self.adapters.clear()
        gc.collect()

    @contextmanager
    def _held(self) -> Iterator[Callable[[], None]]:
        """The executor does nothing until the callable is called; then it counts anew."""
        event = threading.Event()

        def waiting() -> Work[None]:
            yield from ()
            assert event.wait(_WAIT_S)
            self.meter.begin()

        self.executor.submit(waiting())
        try:
            yield event.set
        finally:
            event.set()


@dataclass(frozen=True)
class _Adapters:
    """A source of adapters, made on the card before anything is counted."""

    bench: Bench

    async def load(self, adapter: str) -> Lora:
        return self.bench.adapters[adapter]


@contextmanager
def bench(directory: Path) -> Iterator[Bench]:
    """The model in `directory`, loaded under a meter."""
    meter, executor = Meter(), Executor("card")
    made, modes = MadeOnHost(meter), ExitStack()

    def enter() -> Decoder:
        modes.enter_context(meter)
        modes.enter_context(made)
        return meta_decoder(directory)

    try:
        one = Bench(executor.submit(_once(enter)).result(_WAIT_S), executor, meter)
        yield one
    finally:
        executor.submit(_once(modes.close)).result(_WAIT_S)
        executor.close()


def prompt(length: int, seed: int = 0) -> Prompt:
    return np.random.default_rng(seed).integers(0, _VOCABULARY, length).astype(np.int32)


def _once(work: Callable[[], T]) -> Work[T]:
    yield from ()
    return work()


def _data(lengths: Sequence[int]) -> list[Any]:
    rng = np.random.default_rng(0)
    return [datum(length, "ppo", rng, vocabulary=_VOCABULARY, prompt=length // 4) for length in lengths]
