"""Runs in one pass: each gets the bits that it gets alone, a neighbour's failure is its own, and turns are fair."""

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from knapper.engine.executor import Executor, Work
from knapper.engine.models.decoder import Decoder
from knapper.engine.training import batch as training_batch
from knapper.engine.training.batch import PendingRequest
from knapper.engine.training.scheduler import TrainingResult, TrainingScheduler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import UserError
from knapper.wire.types import AdamW, Datum, ForwardBackward, ForwardBackwardOutput
from tests.engine.runs import datum, done, request, spec, tiny_trainer

SEED = 11


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return tiny_trainer(tmp_path_factory.mktemp("model"), dtype=getattr(torch, request.param))


@pytest.fixture
def device() -> Iterator[Executor]:
    device = Executor()
    yield device
    device.close()


def group(rng: np.random.Generator, loss: str, prompt: int, lengths: tuple[int, ...]) -> list[Datum]:
    """Texts with one prompt, as a group of samples has it."""
    shared = rng.integers(0, 200, prompt).astype(np.int32)
    data = [datum(prompt + length, loss, rng, prompt=prompt - 1) for length in lengths]
    for one in data:
        one.tokens[:prompt] = shared
        one.inputs["target_tokens"][: prompt - 1] = shared[1:]
    return data


def runs(trainer: Trainer) -> list[tuple[RunState, ForwardBackward]]:
    """Of every kind: ranks, targets, alpha, losses, groups, lengths from one token on."""
    rng = np.random.default_rng(SEED)
    shapes = [
        (spec(run="a", rank=4, train_unembed=True), group(rng, "ppo", 21, (5, 9, 5, 12)), "ppo"),
        (spec(run="b", rank=16, alpha=32.0, train_mlp=False), [datum(3, "cross_entropy", rng)], "cross_entropy"),
        (spec(run="c", rank=3, train_attn=False), [datum(1, "cross_entropy", rng)], "cross_entropy"),
        (spec(run="d", rank=8, seed=3), [*group(rng, "dro", 8, (3, 3)), datum(30, "dro", rng)], "dro"),
        (spec(run="e"), [datum(n, "cross_entropy", rng, columns=k) for n, k in ((9, 3), (4, 0))], "cross_entropy"),
    ]
    results = []
    for one, data, loss in shapes:
        state = trainer.create(one)
        warm = request([datum(17, "cross_entropy", rng)])
        state, _ = done(trainer.forward_backward(state, warm))
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=1e-2)))
        results.append((state, request(data, loss)))
    return results


def gathered(
    device: Executor, scheduler: TrainingScheduler, requests: list[tuple[RunState, ForwardBackward]]
) -> list[object]:
    """What each gets, all having arrived before the first pass began."""
    gate = held(device)
    futures = [submitted(scheduler, state, one) for state, one in requests]
    gate.set()
    return [error if (error := future.exception(60)) else future.result() for future in futures]


def submitted(scheduler: TrainingScheduler, state: RunState, body: ForwardBackward) -> "Future[TrainingResult]":
    return scheduler.submit(state, lambda: body)


def held(device: Executor) -> threading.Event:
    """The device's thread waits until the event is set."""
    gate, reached = threading.Event(), threading.Event()

    def wait() -> Work[None]:
        reached.set()
        gate.wait(60)
        yield

    device.submit(wait())
    reached.wait(60)
    return gate


def assert_equal(result: object, state: RunState, output: ForwardBackwardOutput) -> None:
    assert isinstance(result, tuple), result
    after, result_output, cost_s = result
    assert cost_s >= 0
    assert result_output.metrics == output.metrics
    for mine_output, other in zip(result_output.outputs, output.outputs, strict=True):
        np.testing.assert_array_equal(mine_output["logprobs"], other["logprobs"])
    assert (after.grads_P is None) == (state.grads_P is None)
    if state.grads_P is not None:
        assert torch.equal(after.grads_P, state.grads_P)
        assert state.grads_P.abs().max() > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_in_a_crowd_has_the_bits_that_it_has_alone(trainer: Trainer, device: Executor, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        requests = runs(trainer)
        alone = [done(trainer.forward_backward(state, one)) for state, one in requests]
        for order in ([0, 1, 2, 3, 4], [4, 2, 0], [1, 3], [3, 4, 1, 0]):
            scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
            results = gathered(device, scheduler, [requests[index] for index in order])
            assert scheduler.counters.passes == 1
            assert scheduler.counters.shares == len(order)
            for index, result in zip(order, results, strict=True):
                assert_equal(result, *alone[index])
    finally:
        torch.set_num_threads(before)


def test_a_shared_prompt_is_computed_once_and_changes_no_log_probability(trainer: Trainer, device: Executor) -> None:
    rng = np.random.default_rng(SEED)
    state = runs(trainer)[0][0]
    data = group(rng, "importance_sampling", 40, (7, 12, 7, 3))
    together, output = done(trainer.forward_backward(state, request(data, "importance_sampling")))
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    gathered(device, scheduler, [(state, request(data, "importance_sampling"))])
    assert scheduler.counters.rows == 40 + 7 + 12 + 7 + 3
    total = torch.zeros_like(state.weights_P)
    for one, result in zip(data, output.outputs, strict=True):
        alone, alone_output = done(trainer.forward_backward(state, request([one], "importance_sampling")))
        np.testing.assert_array_equal(result["logprobs"], alone_output.outputs[0]["logprobs"])
        assert alone.grads_P is not None
        total += alone.grads_P
    assert together.grads_P is not None
    loose = trainer.decoder.dtype == torch.bfloat16
    torch.testing.assert_close(
        together.grads_P, total, rtol=3e-2 if loose else 1e-4, atol=(3e-2 if loose else 1e-5) * float(total.abs().max())
    )


def test_rows_with_other_targets_are_told_apart(trainer: Trainer) -> None:
    """Two datums with the same tokens and different targets."""
    rng = np.random.default_rng(SEED)
    first, second = datum(12, "cross_entropy", rng), datum(12, "cross_entropy", rng)
    second.tokens[:] = first.tokens
    state = runs(trainer)[1][0]
    _, both = done(trainer.forward_backward(state, request([first, second])))
    for one, result in zip([first, second], both.outputs, strict=True):
        _, alone = done(trainer.forward_backward(state, request([one])))
        np.testing.assert_array_equal(result["logprobs"], alone.outputs[0]["logprobs"])
    assert not np.array_equal(both.outputs[0]["logprobs"], both.outputs[1]["logprobs"])


def test_forward_only_requests_have_passes_of_their_own(trainer: Trainer, device: Executor) -> None:
    requests = runs(trainer)[:3]
    (state, one), *_ = requests
    requests[0] = state, request(one.data, one.loss, forward_only=True)
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    results = gathered(device, scheduler, requests)
    assert scheduler.counters.passes == 2
    for (state, one), result in zip(requests, results, strict=True):
        assert_equal(result, *done(trainer.forward_backward(state, one)))


def test_who_fails_fails_alone(trainer: Trainer, device: Executor) -> None:
    requests = runs(trainer)
    alone = [done(trainer.forward_backward(state, one)) for state, one in requests]
    _, one = requests[0]
    one.data[2].inputs["logprobs"][23] = -500.0
    one.data[2].inputs["advantages"][23] = -1.0  # the ratio overflows, and nothing clips it
    broken = requests[3][0].weights_P * 1e30
    requests[3] = trainer.begin(requests[3][0].spec, broken), requests[3][1]
    results = gathered(device, TrainingScheduler(trainer, device, lambda: 0.0), requests)
    assert isinstance(results[0], UserError)
    assert "datum 2" in str(results[0])
    assert isinstance(results[3], UserError)
    for index in (1, 2, 4):
        assert_equal(results[index], *alone[index])


def test_a_defect_that_one_request_brings_out_fails_no_other(
    trainer: Trainer, device: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = runs(trainer)[:3]
    alone = [done(trainer.forward_backward(state, one)) for state, one in requests]
    compute, culprit = training_batch.compute, requests[1][1].data[0]

    def defective(decoder: Decoder, chosen: list[PendingRequest]) -> Work[None]:
        broken = any(batch.data[0] is culprit for one in chosen for batch in one.waiting)
        yield from compute(decoder, chosen)  # its gradients are added, and then it breaks
        if broken:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(training_batch, "compute", defective)
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    results = gathered(device, scheduler, requests)
    assert isinstance(results[1], RuntimeError)
    assert scheduler.counters.repeated == 3
    for index in (0, 2):
        assert_equal(results[index], *alone[index])


def test_the_device_is_shared_by_rows_and_nobody_starves(
    trainer: Trainer, device: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(SEED)
    monkeypatch.setattr(trainer, "rows_max", 16)
    order: list[str] = []
    compute = training_batch.compute

    def noted(decoder: Decoder, chosen: list[PendingRequest]) -> Work[None]:
        order.extend(names[id(one.lora.a)] for one in chosen)
        return compute(decoder, chosen)

    names: dict[int, str] = {}
    opened = trainer.open

    def open_named(state: RunState, body: ForwardBackward) -> PendingRequest:
        one = opened(state, body)
        names[id(one.lora.a)] = state.spec.run
        return one

    monkeypatch.setattr(trainer, "open", open_named)
    monkeypatch.setattr(training_batch, "compute", noted)
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    long = trainer.create(spec(run="long")), request([datum(16, "cross_entropy", rng) for _ in range(9)])
    short = trainer.create(spec(run="short")), request([datum(12, "cross_entropy", rng) for _ in range(3)])
    gathered(device, scheduler, [long, short])
    assert order[:2] == ["long", "short"]
    assert "".join(name[0] for name in order[:7]).count("s") == 3  # done in turns, not after the long one
    assert order.count("long") == 9


def test_a_cancelled_request_leaves_at_once(trainer: Trainer, device: Executor) -> None:
    (state, one), other = runs(trainer)[:2]
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    gate = held(device)
    leaving, staying = scheduler.submit(state, lambda: one), scheduler.submit(other[0], lambda: other[1])
    assert leaving.cancel()
    gate.set()
    assert_equal(staying.result(60), *done(trainer.forward_backward(*other)))
    assert scheduler.counters.shares == 1
    assert scheduler.waiting == 0


def test_a_request_that_cannot_be_read_is_answered_with_that(trainer: Trainer, device: Executor) -> None:
    def unreadable() -> ForwardBackward:
        raise UserError("not a request")

    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    (state, one), *_ = runs(trainer)
    with pytest.raises(UserError, match="not a request"):
        scheduler.submit(state, unreadable).result(60)
    assert_equal(scheduler.submit(state, lambda: one).result(60), *done(trainer.forward_backward(state, one)))
