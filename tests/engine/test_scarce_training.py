"""Training when memory is scarce: a request that does not fit alone fails, and no other run's bits change."""

import asyncio
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.executor import Executor
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import OutOfMemory
from knapper.wire.types import ForwardBackward
from tests.engine.faults import Operators, cpu_error, gpu_error, on
from tests.engine.runs import datum, done, request, spec, tiny_trainer
from tests.engine.test_run_machine import OPERATIONS, apply_all, bits, optim_step
from tests.engine.training.test_scheduler import assert_equal, gathered, runs

POISON = 199  # a token: three of them in a row are what a test's pass cannot compute


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return tiny_trainer(tmp_path_factory.mktemp("model"), dtype=torch.float32)


@pytest.fixture
def device() -> Iterator[Executor]:
    device = Executor()
    yield device
    device.close()


def poisonous(tokens_N: Tensor) -> bool:
    return bool((tokens_N.unfold(0, 3, 1) == POISON).all(-1).any()) if len(tokens_N) >= 3 else False


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Exception]], list[int]]:
    """From now on passes with poison raise. The rows of all passes, as they begin."""

    def set_error(error: Callable[[], Exception]) -> list[int]:
        real, seen = F.embedding, list[int]()

        def embed(tokens_N: Tensor, weight: Tensor) -> Tensor:
            seen.append(len(tokens_N))
            if poisonous(tokens_N):
                raise error()
            return real(tokens_N, weight)

        monkeypatch.setattr(F, "embedding", embed)
        return seen

    return set_error


def bad(trainer: Trainer) -> tuple[RunState, ForwardBackward]:
    data = [datum(20, "cross_entropy", np.random.default_rng(1))]
    data[0].tokens[:] = POISON
    return trainer.create(spec(run="bad", rank=4)), request(data)


@pytest.mark.parametrize("error", [gpu_error, cpu_error])
def test_a_request_that_does_not_fit_alone_is_told_so_and_the_others_go_on(
    trainer: Trainer,
    device: Executor,
    passes: Callable[[Callable[[], Exception]], list[int]],
    error: Callable[[], Exception],
) -> None:
    requests = [runs(trainer)[index] for index in (0, 3)]
    alone = [done(trainer.forward_backward(state, one)) for state, one in requests]
    seen = passes(error)
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    *results, failed = gathered(device, scheduler, [*requests, bad(trainer)])
    for result, wanted in zip(results, alone, strict=True):
        assert_equal(result, *wanted)
    assert isinstance(failed, OutOfMemory)
    assert "a training pass of bad does not fit into the server's memory: it needs" in str(failed)
    assert "Send shorter datums or fewer of them in a request" in str(failed)
    assert seen[0] > 20, "they shared a pass at first"
    assert seen.count(20) == 2, "once by itself, and once more with all given back"
    assert scheduler.waiting == 0


def test_wherever_memory_is_lacking_for_a_moment_training_is_the_same(trainer: Trainer, device: Executor) -> None:
    """One operator after another fails once: where gradients are allocated, in passes, in losses, in sums."""
    requests = runs(trainer)
    alone = [done(trainer.forward_backward(state, one)) for state, one in requests]
    counted = Operators(lambda _number, _name: False, gpu_error)
    with on(device, counted):
        gathered(device, TrainingScheduler(trainer, device, lambda: 0.0), requests)
    rng = np.random.default_rng(2)
    firsts = range(1, 25)  # where gradients' arenas are made
    for at in [*firsts, *sorted(rng.integers(25, counted.count + 1, 25).tolist())]:
        scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
        broken = Operators(lambda number, _name, at=at: number == at, gpu_error)  # type: ignore[misc]
        with on(device, broken):
            results = gathered(device, scheduler, requests)
        assert broken.broken == 1
        for result, wanted in zip(results, alone, strict=True):
            assert_equal(result, *wanted)
        assert scheduler.waiting == 0


def test_every_operation_is_tried_once_more_and_leaves_the_state_as_it_is(trainer: Trainer, device: Executor) -> None:
    machine = TrainingMachine(trainer, device, lambda: 0.0)

    async def story(breaks: Callable[[int, str], bool]) -> tuple[dict[str, bytes], int]:
        operators = Operators(breaks, cpu_error)
        with on(device, operators):
            state = await machine.create(spec(), None, with_optimizer=False)
            state = await apply_all(machine, state, OPERATIONS)
            files = await bits(machine, state)
            return await bits(machine, await machine.thaw(spec(), files)), operators.count

    wanted, count = asyncio.run(story(lambda _number, _name: False))
    for at in sorted(np.random.default_rng(3).integers(1, count + 1, 15).tolist()):
        assert asyncio.run(story(lambda number, _name, at=at: number == at))[0] == wanted  # type: ignore[misc]


def test_an_optimizer_step_that_lacks_memory_says_so_and_changes_nothing(trainer: Trainer, device: Executor) -> None:
    machine = TrainingMachine(trainer, device, lambda: 0.0)

    async def story() -> None:
        state = await machine.create(spec(), None, with_optimizer=False)
        state = await apply_all(machine, state, OPERATIONS[:2])
        before = await bits(machine, state)
        with on(device, Operators(lambda _number, _name: True, gpu_error)):
            with pytest.raises(OutOfMemory, match=r"an adapter of rank 4, does not fit .* it needs 1024 GiB at once"):
                await machine.apply(state, optim_step(learning_rate=1e-2), None)
        assert await bits(machine, state) == before
        await machine.apply(state, optim_step(learning_rate=1e-2), None)

    asyncio.run(story())
