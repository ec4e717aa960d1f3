"""Every kind of layer over shards, in a group of one: gathered weights are the weights, wherever they are used."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from knapper.engine.executor import Work
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.loader import load
from knapper.engine.ranks.followers import forget_dead
from knapper.engine.ranks.group import Group
from knapper.engine.ranks.leader import Leader
from knapper.engine.ranks.sharded_linear import ShardedLinear
from knapper.engine.ranks.shards import Shards
from knapper.engine.training.trainer import RunState, Trainer
from knapper.wire.types import ForwardBackwardOutput
from tests.engine.runs import datum, done, request, spec
from tests.engine.strange import NATIVE, strange_model
from tests.engine.tiny import tiny_model

_FEW = ("llama", "qwen3", "gemma2", "deepseek_v3", "gpt_oss", "qwen3_moe", "lfm2", "nemotron_h", "qwen3_next_moe")
_KINDS = [
    pytest.param(kind, marks=() if kind in _FEW else pytest.mark.long) for kind in ("llama", "qwen3", *sorted(NATIVE))
]


class Unbounded:
    """knapper.engine.ranks.leader.Bound without other ranks."""

    def waits(self) -> AbstractContextManager[None]:
        return nullcontext()

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    yield Group.join(tmp_path_factory.mktemp("group") / "meeting", 0, 1, torch.device("cpu"))
    dist.destroy_process_group()


def spread(directory: Path, group: Group, dtype: torch.dtype = torch.float32) -> tuple[Decoder, Leader]:
    shards = Shards(group.mesh)
    model = load(directory, dtype, "cpu", Exactness(promised=False), linear=ShardedLinear, made=shards.add)
    assert isinstance(model, Decoder)
    leader = Leader(group, shards, Unbounded())
    model.gather = leader.gather
    return model, leader


def lies_in(directory: Path, kind: str) -> Path:
    return tiny_model(directory, kind=kind) if kind in ("llama", "qwen3") else strange_model(directory, kind)  # type: ignore[arg-type]  # checked by the line itself


@pytest.mark.parametrize("kind", _KINDS)
def test_layers_over_shards_compute_what_they_compute_over_whole_weights(
    tmp_path: Path, group: Group, kind: str
) -> None:
    directory = lies_in(tmp_path, kind)
    model, leader = spread(directory, group)
    rng = np.random.default_rng(3)
    body = request([datum(length, "cross_entropy", rng) for length in (19, 40, 7)])
    found = []
    for trainer in (Trainer(load(directory, exactness=Exactness(promised=False))), Trainer(model, ranks=leader)):
        state = trainer.create(spec(train_unembed=True))
        state, output = done(trainer.forward_backward(state, body))
        assert state.grads_P is not None
        found.append((np.concatenate([each["logprobs"] for each in output.outputs]), state.grads_P.numpy()))
    for whole, sharded in zip(*found, strict=True):
        assert np.abs(sharded - whole).max() <= 1e-5 * np.abs(whole).max()


def test_weights_are_whole_only_while_they_are_gathered(tmp_path: Path, group: Group) -> None:
    model, leader = spread(tiny_model(tmp_path), group)
    linear = model.weights.layers[0].linears[0]
    assert isinstance(linear, ShardedLinear)
    assert linear.whole_OI.numel() == 0
    with leader.gather(0, 1):
        assert tuple(linear.whole_OI.shape) == (linear.outputs, linear.inputs)
        with leader.gather(0, 1):  # who is inside of it uses it too
            pass
        assert linear.whole_OI.numel() > 0
    assert linear.whole_OI.numel() == 0


def test_a_pass_that_fails_leaves_nothing_gathered_and_the_next_one_is_right(tmp_path: Path, group: Group) -> None:
    model, leader = spread(tiny_model(tmp_path), group)
    trainer = Trainer(model, ranks=leader)
    state = trainer.create(spec())
    body = request([datum(9, "cross_entropy", np.random.default_rng(1))])
    expected = done(trainer.forward_backward(state, body))[1].outputs[0]["logprobs"]
    broken = trainer.forward_backward(state, body)
    next(broken)
    broken.close()  # between two layers, with the next one under way
    again = done(trainer.forward_backward(state, body))[1].outputs[0]["logprobs"]
    assert np.array_equal(again, expected)


def test_meeting_places_of_dead_processes_are_deleted(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = [f"knapper-ranks-{pid}-x" for pid in (ended.pid, os.getpid(), os.getppid(), "none")]
    for name in names:
        (tmp_path / name / "logs").mkdir(parents=True)
    forget_dead(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:]), "its own are of one before it with its id"


def test_samples_take_turns_with_a_pass(tmp_path: Path, group: Group) -> None:
    """Between any two layers of it: what it has begun to gather may be used, and is gathered again."""
    model, leader = spread(tiny_model(tmp_path), group)
    trainer = Trainer(model, ranks=leader)
    state = trainer.create(spec())
    body = request([datum(9, "cross_entropy", np.random.default_rng(1))])
    calm = done(trainer.forward_backward(state, body))[0].grads_P
    tokens = torch.arange(1, 12)

    def drawn() -> torch.Tensor:
        with torch.inference_mode():
            rows = model.hidden(tokens, [11], [])
            return model.target_logprobs(rows, tokens, None, np.ones(11, dtype=bool))

    alone = drawn()

    def disturbed() -> Work[tuple[RunState, ForwardBackwardOutput]]:
        task = trainer.forward_backward(state, body)
        while True:
            try:
                next(task)
            except StopIteration as stop:
                result: tuple[RunState, ForwardBackwardOutput] = stop.value
                return result
            assert torch.equal(drawn(), alone)
            yield

    grads_P = done(disturbed())[0].grads_P
    assert calm is not None
    assert grads_P is not None
    assert torch.equal(grads_P, calm)
