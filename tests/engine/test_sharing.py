"""Loops that wait for slow rewards on one engine, in a time that only turns of the device let pass.

The scheduling is the real one, and so is what is computed, on a tiny model; each turn then takes the seconds that it
took with SmolLM2-135M on two cores of a CPU, so that the figures are those of no machine.
"""

import asyncio
import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import pytest

from knapper.engine.executor import Executor, Work
from knapper.engine.models.decode import NativeDecodeState
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training import batch
from knapper.engine.training.batch import PendingRequest
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.engine.training.trainer import Trainer
from knapper.wire.progress import TokenEvent
from knapper.wire.types import SampleRequest, SamplingParams
from tests.engine.runs import datum, request, spec, tiny_trainer
from tests.engine.sampling.test_scheduler import AdapterDict

SAMPLES, TOKENS, ROWS = 8, 8, 104
ALONE_S = 2.3  # a step of one loop without its reward: what the turns below add up to
WAIT_S = 2 * ALONE_S
BETWEEN_S = 0.25  # from the gradient to the next sample: the optimizer, the save, the way to the client and back
LAYERS = 30  # of SmolLM2
APART_S = 0.01  # loops that begin at once


def pass_s(rows: int) -> float:
    return 0.25 + 0.0074 * rows


def decoding_s(sequences: int) -> float:
    return 0.10 + 0.006 * sequences


def prefill_s(prompts: int) -> float:
    return 0.07 + 0.15 * prompts


class World:
    """Simulated time and its events, on the device's thread, so that every run of the test is the same."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.idle: list[tuple[float, float]] = []
        self.under_way = 0  # requests that the device has
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.over = threading.Event()

    def at(self, when_s: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._later, (when_s, next(self._numbers), then))

    def spend(self, seconds: float) -> None:
        self.now_s += seconds
        self.happen()

    def happen(self) -> None:
        while self._later and self._later[0][0] <= self.now_s:
            heapq.heappop(self._later)[2]()

    def rest(self) -> Work[None]:
        """A turn without work, until some arrives."""
        while not self.under_way and self._later and not self.over.is_set():
            self.idle.append((self.now_s, self._later[0][0]))
            self.now_s = self._later[0][0]
            self.happen()
        yield


class Loops:
    """`count` of them: sample a group, wait for its rewards, train on it."""

    def __init__(self, world: World, trainer: Trainer, device: Executor, count: int, steps: int) -> None:
        self.world, self.device = world, device
        self.scheduler = TrainingScheduler(trainer, device, lambda: world.now_s)
        self.sampler = EngineSampler(
            trainer.decoder, device, AdapterDict({}), None, slots_max=64, kv_tokens_max=65536, now=lambda: world.now_s
        )
        self.ends: list[list[float]] = [[] for _ in range(count)]
        self.steps = steps
        rng = np.random.default_rng(0)
        self.request_body = request([datum(ROWS // SAMPLES, "cross_entropy", rng) for _ in range(SAMPLES)])
        self.states = [trainer.create(spec(run=f"run-{index}")) for index in range(count)]
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.sampling: list[Future[Any]] = []

    def close(self) -> None:
        for future in self.sampling:
            future.cancel()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def begin(self) -> Work[None]:
        for index in range(len(self.ends)):
            self.world.at(APART_S * index, partial(self.sample, index))
        self.world.happen()
        yield

    def sample(self, index: int) -> None:
        ended = itertools.count(1)

        def listen(drawn: TokenEvent) -> None:
            if drawn.ending and next(ended) == SAMPLES:
                self.done(self.world.now_s + WAIT_S, partial(self.train, index))

        self.world.under_way += 1
        wanted = SampleRequest(
            "", "", np.arange(12, dtype=np.int32) + index, SamplingParams(max_tokens=TOKENS, ignore_eos=True),
            num_samples=SAMPLES, seed=index,
        )  # fmt: skip
        arrived = self.sampler.waiting + 1
        self.sampling.append(asyncio.run_coroutine_threadsafe(self.sampler.sample(wanted, listen), self.loop))
        while self.sampler.waiting < arrived:  # the other thread only brings it here
            time.sleep(0.0001)

    def train(self, index: int) -> None:
        self.world.under_way += 1
        answer = self.scheduler.submit(self.states[index], lambda: self.request_body)
        answer.add_done_callback(lambda _: self.step_done(index))

    def step_done(self, index: int) -> None:
        self.ends[index].append(self.world.now_s)
        if min(map(len, self.ends)) >= self.steps:
            self.world.over.set()
        self.done(self.world.now_s + BETWEEN_S, partial(self.sample, index))

    def done(self, when_s: float, then: Callable[[], None]) -> None:
        self.world.under_way -= 1
        self.world.at(when_s, then)
        if not self.world.under_way:
            self.device.submit(self.world.rest(), "rest")


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return tiny_trainer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def world(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    world = World()
    compute, step, prompts = batch.compute, NativeDecodeState.step, trainer.decoder.prefill

    def computed(model: Any, chosen: Sequence[PendingRequest]) -> Work[None]:
        takes_s = pass_s(sum(one.waiting[0].rows for one in chosen))
        for _ in compute(model, chosen):
            pass
        for _ in range(2 * LAYERS):
            world.spend(takes_s / (2 * LAYERS))
            yield

    def stepped(self: NativeDecodeState, *args: Any) -> Any:
        result = step(self, *args)
        world.spend(decoding_s(len(self.rows)))
        return result

    def prefilled(args: Sequence[Any]) -> Any:
        world.spend(prefill_s(len(args)))
        return prompts(args)

    monkeypatch.setattr(batch, "compute", computed)
    monkeypatch.setattr(NativeDecodeState, "step", stepped)
    monkeypatch.setattr(trainer.decoder, "prefill", prefilled)
    yield world
    world.over.set()


def measured(world: World, trainer: Trainer, count: int) -> tuple[float, float]:
    """(steps a second of all loops, the part of the time in which the device computed), once they are settled."""
    device, skipped = Executor("sharing", lambda: world.now_s), 3
    loops = Loops(world, trainer, device, count, steps=8)
    try:
        device.submit(loops.begin())
        assert world.over.wait(120)
    finally:
        device.close()
        loops.close()
    began_s = max(own[skipped] for own in loops.ends)
    each = [[end for end in own if end >= began_s] for own in loops.ends]
    rate = sum((len(own) - 1) / (own[-1] - own[0]) for own in each)
    idle_s = sum(until_s - max(from_s, began_s) for from_s, until_s in world.idle if until_s > began_s)
    return rate, 1 - idle_s / (world.now_s - began_s)


@pytest.mark.parametrize(("count", "times", "busy"), [(3, 2.7, 0.75), (8, 3.8, 0.95)])
def test_loops_that_wait_for_rewards_do_not_fall_into_step(
    trainer: Trainer, world: World, count: int, times: float, busy: float
) -> None:
    """Three loops do at least 2.7 times the work of one, of 3 that are possible; eight keep the device busy."""
    rate, share = measured(world, trainer, count)
    assert rate * (WAIT_S + ALONE_S) >= times
    assert share >= busy
