"""An idle run is unloaded from a living engine, and restored bit by bit."""

import asyncio
import json
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

from knapper import limits
from knapper.engine.executor import Executor, Work
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import Unavailable
from knapper.events.cloudevents import Committed
from knapper.ids import RunId
from knapper.serving.runs import ClaimedRuns
from knapper.state import layout
from knapper.state.journal.accept import Acceptor, newest_manifest
from knapper.state.journal.holder import Holder
from knapper.state.journal.machine import Files
from knapper.state.journal.records import Creation, Spec
from knapper.store.memory import MemoryStore
from knapper.wire import proto
from tests.engine.runs import RUN as NAME
from tests.engine.runs import datum, request, spec, tiny_trainer
from tests.sim.history import TERMS, Step, send

RUN = RunId(NAME)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return tiny_trainer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def device() -> Iterator[Executor]:
    device = Executor()
    yield device
    device.close()


class Watched(TrainingMachine):
    """Remembers, without holding it, every state that it made; `failing` freezes fail first."""

    def __init__(self, trainer: Trainer, device: Executor, failing: int = 0) -> None:
        super().__init__(trainer, device, time.monotonic)
        self.states: list[weakref.ref[RunState]] = []
        self.thawed = 0
        self.failing = failing

    @property
    def alive(self) -> int:
        return sum(one() is not None for one in self.states)

    async def apply(self, state: RunState, *rest: Any) -> Any:
        outcome = await super().apply(state, *rest)
        self.states.append(weakref.ref(outcome.state))
        return outcome

    async def serialize(self, state: RunState) -> Files:
        if self.failing:
            self.failing -= 1
            raise Unavailable("the store is away")
        return await super().serialize(state)

    async def restore(self, spec: Spec, files: Files) -> RunState:
        self.thawed += 1
        state = await super().restore(spec, files)
        self.states.append(weakref.ref(state))
        return state


def _steps() -> list[Step]:
    """Ends with gradients that are still pending when the run rests."""
    rng = np.random.default_rng(1)
    steps: list[Step] = []
    for seq in range(1, 7):
        if seq % 3:
            body = proto.encode_forward_backward(request([datum(12, "cross_entropy", rng) for _ in range(2)]))
            steps.append(Step(seq, "forward_backward", body))
        else:
            adam = {"learning_rate": 1e-2}
            body = json.dumps({"model_id": RUN, "seq_id": seq, "adam_params": adam}).encode()
            steps.append(Step(seq, "optim_step", body))
    return steps


async def _ring(runs: ClaimedRuns[RunState]) -> AsyncIterator[bytes]:
    async for frame in runs.answer(RUN):
        if isinstance(frame, Committed):
            for result in frame.commit.results:
                assert not result.failed, result.body
                yield result.body


@pytest.fixture
def worth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes cost nothing: a run that leaves the memory is stored, however short its replay would be."""
    monkeypatch.setattr(limits, "snapshot_replay_s_min", 0.0)
    monkeypatch.setattr(limits, "snapshot_bytes_per_replay_s", 10**18)


async def _story(machine: Watched, idle_s: float) -> tuple[list[bytes], ClaimedRuns[RunState], MemoryStore]:
    """The results of one step per doorbell; with `idle_s` the run is unloaded after each."""
    store = MemoryStore()
    acceptor = Acceptor(store, lambda: 0.0)
    await acceptor.create(Creation(spec=spec()), b"create")
    runs = ClaimedRuns(store, machine, Holder("h", "", TERMS), lambda: 0.0, idle_s=idle_s)
    answers: list[bytes] = []
    for step in _steps():
        await send(acceptor, step)
        answers += [body async for body in _ring(runs)]
        while idle_s and runs.loaded:  # noqa: ASYNC110  nothing signals that a run was unloaded
            await asyncio.sleep(0.001)
    return answers, runs, store


@pytest.mark.usefixtures("worth")
def test_a_run_that_rests_after_every_operation_gives_the_bits_of_one_that_never_does(
    trainer: Trainer, device: Executor
) -> None:
    resting, awake = Watched(trainer, device), Watched(trainer, device)
    with_rests, _, store = asyncio.run(_story(resting, 0.001))
    without, runs, _ = asyncio.run(_story(awake, 0.0))
    assert with_rests == without
    assert len(with_rests) == len(_steps()) + 1  # the creation too
    assert (resting.thawed, awake.thawed) == (len(_steps()) - 1, 0)
    assert runs.loaded == 1

    async def newest() -> int:
        manifest = await newest_manifest(store, RUN)
        assert manifest is not None
        return manifest[1].snapshot_seq

    assert asyncio.run(newest()) == len(_steps()), "it left the memory, and its last operation is in no snapshot"


def test_a_run_whose_replay_is_short_rests_without_a_snapshot_and_gives_the_same_bits(
    trainer: Trainer, device: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "snapshot_bytes_per_replay_s", 1)
    resting, awake = Watched(trainer, device), Watched(trainer, device)
    with_rests, _, store = asyncio.run(_story(resting, 0.001))
    without, _, _ = asyncio.run(_story(awake, 0.0))
    assert with_rests == without
    assert resting.thawed == 0
    assert asyncio.run(store.list(layout.snapshots(RUN))) == []


def test_a_run_that_rests_leaves_nothing_of_its_state_in_memory(trainer: Trainer, device: Executor) -> None:
    machine = Watched(trainer, device)
    _, runs, _ = asyncio.run(_story(machine, 0.001))
    assert runs.loaded == 0
    device.submit(_nothing()).result(10)  # the device's thread has let go of what it computed last
    assert machine.alive == 0


@pytest.mark.usefixtures("worth")
def test_a_run_stays_in_memory_until_its_snapshot_is_safe(trainer: Trainer, device: Executor) -> None:
    machine = Watched(trainer, device, failing=3)
    answers, _, _ = asyncio.run(_story(machine, 0.001))
    assert machine.failing == 0
    assert machine.thawed == len(_steps()) - 1, "it was let go while only its journal had it"
    assert len(answers) == len(_steps()) + 1


def _nothing() -> Work[None]:
    yield from ()
