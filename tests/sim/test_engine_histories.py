"""The same histories with the real engine: LoRA passes on a tiny model, AdamW, exports, loads.

Replay one:  python -m pytest tests/sim/test_engine_histories.py -k SEED
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar, cast

import numpy as np
import pytest
import torch

from knapper.engine.executor import Executor, Work
from knapper.engine.models import weights
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.training.trainer import Trainer
from knapper.wire import proto
from knapper.wire.types import Datum, ForwardBackward
from tests.engine.tiny import tiny_model
from tests.sim.history import RUN, Step, make_plan, play

T = TypeVar("T")


class Inline:
    """A device without a thread: the simulation decides what runs when."""

    async def run(self, task: Work[T], whose: str = "") -> T:
        return self.submit(task, whose).result()

    def submit(self, task: Work[T], whose: str = "") -> "Future[T]":
        """All of it, at once."""
        future: Future[T] = Future()
        while True:
            try:
                next(task)
            except StopIteration as stop:
                future.set_result(cast(T, stop.value))
                return future


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingMachine]:
    directory = tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    config = ModelConfig.read(directory)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    trainer = Trainer(Decoder(config, weights.load(directory, config)))
    ticks = iter(range(10**9))
    yield TrainingMachine(trainer, cast(Executor, Inline()), lambda: 5.0 * next(ticks))  # each piece "takes" 5 s
    torch.set_num_threads(before)


def engine_plan(seed: int) -> list[Step]:
    """The ledger's plan, with real requests in it."""
    draw = np.random.default_rng(seed)
    plan = []
    for step in make_plan(seed, length=10 + seed % 8):
        if step.kind == "forward_backward":
            tokens = draw.integers(0, 200, 6).astype(np.int32)
            targets = draw.integers(0, 200, 5 if step.body == b"wrong" else 6).astype(np.int64)
            inputs: dict[str, np.ndarray] = {"target_tokens": targets, "weights": draw.random(6).astype(np.float32)}
            request = ForwardBackward(RUN, step.seq, [Datum(tokens, inputs)], "cross_entropy", {}, False)
            step = replace(step, body=proto.encode_forward_backward(request))
        elif step.kind == "optim_step" and not step.rejected:
            body = b'{"model_id":"%s","seq_id":%d,"adam_params":{"learning_rate":0.01}}' % (RUN.encode(), step.seq)
            step = replace(step, body=body)
        plan.append(step)
    return plan


@pytest.mark.parametrize("seed", range(8))
def test_weights_moments_and_gradients_survive_kills_bit_for_bit(machine: TrainingMachine, seed: int) -> None:
    world = play(seed, faults=30, machine=machine, plan=engine_plan(seed))
    assert world.kills > 0
