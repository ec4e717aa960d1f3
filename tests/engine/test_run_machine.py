"""Operations as they lie in the journal become steps and answers; a replay from any snapshot gives the same bits."""

import asyncio
import gc
import json
import time
import weakref
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest

from knapper.engine.executor import Executor
from knapper.engine.models.decoder import Decoder
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import Corrupt, InvalidField, UserError
from knapper.state.journal.machine import Files, Machine
from knapper.state.journal.records import Kind, Operation
from knapper.wire import proto, zstd
from tests.engine.runs import RUN, datum, request, spec, tiny_trainer

T = TypeVar("T")
CHECKPOINT = f"tinker://{RUN}/weights/here"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return tiny_trainer(tmp_path_factory.mktemp("model"))


@pytest.fixture
def device() -> Iterator[Executor]:
    device = Executor()
    yield device
    device.close()


@pytest.fixture
def machine(trainer: Trainer, device: Executor) -> TrainingMachine:
    return TrainingMachine(trainer, device, Ticks())


class Ticks:
    """A clock that moves by one second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def operation(kind: Kind, body: bytes) -> Operation:
    return Operation(run=RUN, seq=1, kind=kind, sha256=b"", body_zstd=zstd.compress(body), accepted_at=0.0)


def forward_backward(seed: int, loss: str = "cross_entropy", **changes: Any) -> Operation:
    rng = np.random.default_rng(seed)
    data = [datum(n, loss, rng) for n in (12, 30, 5)]
    return operation("forward_backward", proto.encode_forward_backward(request(data, loss, **changes)))


def optim_step(**adam: float) -> Operation:
    return operation("optim_step", json.dumps({"model_id": RUN, "seq_id": 1, "adam_params": adam}).encode())


def load(*, optimizer: bool) -> Operation:
    body = {"model_id": RUN, "seq_id": 1, "path": CHECKPOINT, "optimizer": optimizer}
    return operation("load_weights", json.dumps(body).encode())


def save(kind: Kind = "save_weights") -> Operation:
    return operation(kind, json.dumps({"model_id": RUN, "seq_id": 1, "path": "here"}).encode())


OPERATIONS = [
    forward_backward(0), forward_backward(1, "ppo"), optim_step(learning_rate=1e-2), forward_backward(2),
    optim_step(learning_rate=5e-3, grad_clip_norm=0.1), forward_backward(3),
]  # fmt: skip


async def apply_all(machine: Machine[RunState], state: RunState, operations: list[Operation]) -> RunState:
    for one in operations:
        state = (await machine.apply(state, one, None)).state
    return state


async def bits(machine: Machine[RunState], state: RunState) -> dict[str, bytes]:
    return {name: bytes(data) for name, data in (await machine.serialize(state)).items()}


def test_it_is_a_machine(machine: TrainingMachine) -> None:
    typed: Machine[RunState] = machine  # the type checker's word; below, its behaviour
    assert typed is machine


def test_answers_are_what_the_client_reads(machine: TrainingMachine) -> None:
    async def story() -> None:
        state = await machine.create(spec(), None, False)
        outcome = await machine.apply(state, OPERATIONS[0], None)
        assert outcome.content_type == "application/x-protobuf"
        output = proto.decode_forward_backward_output(outcome.body)
        assert [o["logprobs"].shape for o in output.outputs] == [(12,), (30,), (5,)]
        assert "loss:sum" in output.metrics
        stepped = await machine.apply(outcome.state, OPERATIONS[2], None)
        assert stepped.content_type == "application/json"
        metrics = json.loads(stepped.body)["metrics"]
        assert metrics["learning_rate"] == 1e-2
        assert metrics["optimizer_steps"] == 1.0
        assert stepped.state.moments.step == 1

    run(story())


def test_replay_from_a_snapshot_at_any_point_gives_the_same_bits(machine: TrainingMachine) -> None:
    async def story() -> None:
        whole = await bits(machine, await apply_all(machine, await machine.create(spec(), None, False), OPERATIONS))
        assert "grads.f32" in whole
        for cut in range(len(OPERATIONS) + 1):
            state = await apply_all(machine, await machine.create(spec(), None, False), OPERATIONS[:cut])
            restored = await machine.restore(spec(), await bits(machine, state))
            assert await bits(machine, await apply_all(machine, restored, OPERATIONS[cut:])) == whole

    run(story())


def test_a_run_in_a_crowd_ends_with_the_bits_of_a_run_alone(machine: TrainingMachine) -> None:
    async def one(seed: int) -> dict[str, bytes]:
        return await bits(
            machine, await apply_all(machine, await machine.create(spec(seed=seed), None, False), OPERATIONS)
        )

    async def several_runs() -> list[dict[str, bytes]]:
        return await asyncio.gather(*(one(seed) for seed in range(4)))

    together = run(several_runs())
    assert together == [run(one(seed)) for seed in range(4)]
    assert together[0] != together[1]


def test_a_users_mistake_raises_and_changes_nothing(machine: TrainingMachine) -> None:
    async def story() -> None:
        state = await apply_all(machine, await machine.create(spec(), None, False), OPERATIONS)
        before = await bits(machine, state)
        for wrong, error in (
            (forward_backward(0, "ppo", config={"epsilon": 0.1}), "epsilon"),
            (operation("forward_backward", b"\xff\xff"), "protobuf"),
            (optim_step(learning_rate=-1.0), "learning_rate"),
            (operation("optim_step", b"{"), "JSON"),
            (operation("optim_step", b'{"model_id":"x","seq_id":1,"optimizer_params":{"type":"dimuon"}}'), "dimuon"),
        ):
            with pytest.raises(UserError, match=error):
                await machine.apply(state, wrong, None)
        assert await bits(machine, state) == before

    run(story())


async def saved(machine: TrainingMachine, kind: Kind = "save_weights") -> tuple[RunState, Files]:
    state = await apply_all(machine, await machine.create(spec(), None, False), OPERATIONS)
    outcome = await machine.apply(state, save(kind), None)
    assert (outcome.body, outcome.state) == (b"", state)
    return state, outcome.export


def test_loading_replaces_weights_and_drops_pending_gradients(machine: TrainingMachine) -> None:
    async def story() -> None:
        state, files = await saved(machine)
        other = await apply_all(machine, await machine.create(spec(seed=8), None, False), OPERATIONS[:3])
        for optimizer in (True, False):
            outcome = await machine.apply(other, load(optimizer=optimizer), files)
            answer = json.loads(outcome.body)
            assert (answer["path"], answer["type"]) == (CHECKPOINT, "load_weights")
            resumed_state, wanted = await bits(machine, outcome.state), await bits(machine, state)
            assert resumed_state["weights.f32"] == wanted["weights.f32"]
            assert "grads.f32" not in resumed_state
            assert outcome.state.spec.seed == 8
            assert (resumed_state["m.f32"] == wanted["m.f32"], resumed_state["v.f32"] == wanted["v.f32"]) == (
                optimizer,
                optimizer,
            )
            assert outcome.state.moments.step == (2 if optimizer else 0)
            assert any(resumed_state["m.f32"]) is optimizer

    run(story())


def test_training_goes_on_from_a_checkpoint_as_if_nothing_had_happened(machine: TrainingMachine) -> None:
    async def story() -> None:
        state = await apply_all(machine, await machine.create(spec(), None, False), OPERATIONS[:3])
        files = (await machine.apply(state, save(), None)).export
        resumed = await machine.create(spec(run=RUN.replace(":0", ":1")), files, True)
        resumed_state = await apply_all(machine, resumed, OPERATIONS[3:])
        wanted = await apply_all(machine, state, OPERATIONS[3:])
        assert await bits(machine, resumed_state) == await bits(machine, wanted)

    run(story())


def test_a_sampler_checkpoint_has_weights_and_no_optimizer(machine: TrainingMachine) -> None:
    async def story() -> None:
        state, files = await saved(machine, "save_weights_for_sampler")
        assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
        fresh = await machine.create(spec(), files, False)
        assert (await bits(machine, fresh))["weights.f32"] == (await bits(machine, state))["weights.f32"]
        with pytest.raises(InvalidField, match="without optimizer state"):
            await machine.create(spec(), files, True)

    run(story())


def test_a_checkpoint_of_another_rank_is_refused_and_changes_nothing(machine: TrainingMachine) -> None:
    async def story() -> None:
        _, files = await saved(machine)
        other = await machine.create(spec(rank=5), None, False)
        with pytest.raises(InvalidField, match="r is 4; allowed: 5, which this run has"):
            await machine.apply(other, load(optimizer=False), files)
        with pytest.raises(InvalidField, match="target_modules"):
            await machine.create(spec(train_mlp=False), files, False)
        with pytest.raises(Corrupt, match="not handed"):
            await machine.apply(other, load(optimizer=False), None)

    run(story())


def test_the_cost_is_that_of_the_operations_own_pieces(
    trainer: Trainer, device: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "rows_max", 10)  # three datums, three passes

    async def story() -> None:
        machine = TrainingMachine(trainer, device, Ticks())
        state = await machine.create(spec(), None, False)
        outcomes = await asyncio.gather(*(machine.apply(state, OPERATIONS[0], None) for _ in range(3)))
        assert isinstance(trainer.decoder, Decoder)
        layer_segments = len(trainer.decoder.config.layers) + 1
        segments = 3 * (2 * layer_segments + 2)  # each pass: the stretches, the head, the stretches backward, the end
        assert [outcome.cost_s for outcome in outcomes] == [segments] * 3  # a second for each, none for waiting

    run(story())


def test_an_idle_engine_keeps_nothing_of_a_run_that_was_let_go(machine: TrainingMachine) -> None:
    async def lived() -> "list[weakref.ref[Any]]":
        state = await machine.create(spec(), None, False)
        seen = [weakref.ref(state.weights_P), weakref.ref(state.moments.m_P)]
        state = (await machine.apply(state, forward_backward(1), None)).state
        assert state.grads_P is not None
        seen.append(weakref.ref(state.grads_P))
        state = (await machine.apply(state, optim_step(), None)).state
        return [*seen, weakref.ref(state.weights_P), weakref.ref(state.moments.v_P)]

    seen = run(lived())
    until = time.monotonic() + 5
    while any(one() is not None for one in seen) and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)  # the device's thread lets go a moment after it has answered
    assert [one() is None for one in seen] == [True] * 5
