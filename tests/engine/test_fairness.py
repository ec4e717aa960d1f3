"""The order of passes, the shares of rows, and the waiting times between runs. Counted, never timed."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from knapper.engine.executor import Executor, Work
from knapper.engine.run_machine import TrainingMachine
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training import batch
from knapper.engine.training.batch import PendingRequest
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.wire.types import Datum, ForwardBackward, SampleRequest, SamplingParams
from tests.engine.runs import datum, request, spec, tiny_trainer
from tests.engine.sampling.test_scheduler import AdapterDict
from tests.engine.test_run_machine import optim_step
from tests.engine.training.test_scheduler import gathered, held, submitted

ROWS_MAX = 32


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    made = tiny_trainer(tmp_path_factory.mktemp("model"))
    return Trainer(made.decoder, ROWS_MAX)


@pytest.fixture
def device() -> Iterator[Executor]:
    device = Executor()
    yield device
    device.close()


@pytest.fixture
def turns(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, int]]]:
    """(run, rows) of each pass that was computed, as it happens."""
    passes: list[list[tuple[str, int]]] = []
    names: dict[int, str] = {}
    opened, compute = trainer.open, batch.compute

    def named(state: RunState, opened_run: ForwardBackward) -> PendingRequest:
        one = opened(state, opened_run)
        names[id(one)] = state.spec.run
        return one

    def noted(model: object, chosen: list[PendingRequest]) -> Work[None]:
        passes.append([(names[id(one)], one.waiting[0].rows) for one in chosen])
        return compute(model, chosen)  # type: ignore[arg-type]  # a Model

    monkeypatch.setattr(trainer, "open", named)
    monkeypatch.setattr(batch, "compute", noted)
    return passes


def datums(count: int, length: int) -> list[Datum]:
    rng = np.random.default_rng(count * 100 + length)
    return [datum(length, "cross_entropy", rng) for _ in range(count)]


def opened_run(trainer: Trainer, name: str, count: int, length: int) -> tuple[RunState, ForwardBackward]:
    return trainer.create(spec(run=name)), request(datums(count, length))


@pytest.mark.parametrize(("lengths", "bound"), [([10] * 8, 10), ([3, 5, 8, 10, 16, 24, 30, 32], 3 * ROWS_MAX)])
def test_runs_that_always_want_more_get_equal_shares_by_rows(
    trainer: Trainer, device: Executor, turns: list[list[tuple[str, int]]], lengths: list[int], bound: int
) -> None:
    """Eight closed loops, each of which asks again as soon as it is answered."""
    scheduler, rounds = TrainingScheduler(trainer, device, lambda: 0.0), 80
    over = threading.Event()

    def ask(name: str, state: RunState, wanted: ForwardBackward) -> None:
        def again(_: object) -> None:
            if len(turns) >= rounds:
                over.set()
            else:
                ask(name, state, wanted)

        submitted(scheduler, state, wanted).add_done_callback(again)

    gate = held(device)
    for index, length in enumerate(lengths):
        ask(f"run-{index}", *opened_run(trainer, f"run-{index}", 1, length))
    gate.set()
    assert over.wait(60)
    served = Counter[str]()
    for name, rows in (one for turn in turns[:rounds] for one in turn):
        served[name] += rows
    assert len(served) == len(lengths)
    assert max(served.values()) - min(served.values()) <= bound
    if bound == 10:
        assert max(served.values()) / min(served.values()) <= 1.05
        assert scheduler.shares(3) == pytest.approx([1 / 8] * 3, rel=0.05)


def test_a_veteran_does_not_wait_for_a_newcomer_to_catch_up(
    trainer: Trainer, device: Executor, turns: list[list[tuple[str, int]]]
) -> None:
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    gathered(device, scheduler, [opened_run(trainer, "veteran", 20, 32)])
    turns.clear()
    gathered(device, scheduler, [opened_run(trainer, "new", 6, 32), opened_run(trainer, "veteran", 6, 32)])
    assert [name for ((name, _),) in turns] == ["new", "veteran"] * 6


def test_a_newcomer_does_not_catch_up_with_what_others_had_before_it_came(
    trainer: Trainer, device: Executor, turns: list[list[tuple[str, int]]]
) -> None:
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    gate = held(device)
    busy, first = (submitted(scheduler, *opened_run(trainer, name, n, 32)) for name, n in (("busy", 12), ("first", 4)))
    late = opened_run(trainer, "new", 4, 32)
    later: Future[Any] = Future()
    first.add_done_callback(lambda _: submitted(scheduler, *late).add_done_callback(later.set_result))
    gate.set()
    later.result(60).result(60)
    busy.result(60)
    names = [name for ((name, _),) in turns]
    assert names[:8] == ["busy", "first"] * 4
    assert names.count("new") == 4
    assert ("new", "new") not in itertools.pairwise(names)


def test_another_runs_optim_step_waits_for_one_pass_at_most(
    trainer: Trainer, device: Executor, turns: list[list[tuple[str, int]]]
) -> None:
    """The barrier is each run's own: a step of `short` is applied while `long` has most of its passes before it."""
    machine = TrainingMachine(trainer, device, lambda: 0.0)
    gate = held(device)
    long = submitted(machine.scheduler, *opened_run(trainer, "long", 30, 32))

    async def short() -> int:
        await machine.apply(trainer.create(spec(run="short")), optim_step(learning_rate=1e-3), None)
        return len(turns)

    async def story() -> int:
        work = asyncio.ensure_future(short())
        await asyncio.sleep(0)  # it is in the device's queue now
        gate.set()
        return await work

    assert asyncio.run(story()) <= 2  # the pass under way, and one that began before this thread saw the answer
    assert isinstance(long.result(60), tuple)
    assert len(turns) == 30


@pytest.mark.parametrize("loops", [1, 4])
def test_sampling_takes_its_turns_within_a_pass(
    trainer: Trainer, device: Executor, turns: list[list[tuple[str, int]]], monkeypatch: pytest.MonkeyPatch, loops: int
) -> None:
    """Neither waits for the other's end: between two layers of a pass there are decoding steps, and the reverse."""
    sampler = EngineSampler(
        trainer.decoder, device, AdapterDict({}), None, slots_max=8, kv_tokens_max=4096, now=time.monotonic
    )
    scheduler = TrainingScheduler(trainer, device, lambda: 0.0)
    before: list[int] = []  # decoding steps before each piece of a pass
    compute = batch.compute

    def noted(model: object, chosen: list[PendingRequest]) -> Work[None]:
        for _ in compute(model, chosen):  # type: ignore[arg-type]  # a Model
            before.append(sampler.counters.steps)
            yield

    monkeypatch.setattr(batch, "compute", noted)
    prompt = np.arange(8, dtype=np.int32)
    samples = [SampleRequest("tiny", "", prompt, SamplingParams(max_tokens=24), seed=n) for n in range(6)]

    async def story() -> None:
        gate = held(device)
        futures = [submitted(scheduler, *opened_run(trainer, f"run-{n}", 40 // loops, 32)) for n in range(loops)]
        work = [asyncio.ensure_future(sampler.sample(one)) for one in samples]
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*work, *map(asyncio.wrap_future, futures))

    asyncio.run(story())
    assert len(turns) == 40
    chunk = len(before) // 40
    within = [before[n * chunk + chunk - 1] - before[n * chunk] for n in range(40)]
    assert sum(within) > 0  # decoding goes on while a pass is under way
    assert len([n for n in before if 0 < n < max(before)]) > 1  # and passes while sequences are


def test_what_waits_and_how_full_passes_are_is_counted(trainer: Trainer, device: Executor) -> None:
    now = [100.0]
    scheduler = TrainingScheduler(trainer, device, lambda: now[0])
    assert (scheduler.waiting, scheduler.oldest_s(), scheduler.shares(8)) == (0, 0.0, [])
    gate = held(device)
    futures: list[Future[Any]] = []
    for name, count in (("a", 1), ("b", 1), ("c", 2)):
        futures.append(submitted(scheduler, *opened_run(trainer, name, count, 16)))
        now[0] += 5.0
    assert (scheduler.waiting, scheduler.oldest_s()) == (3, 15.0)
    gate.set()
    for future in futures:
        future.result(60)
    assert (scheduler.waiting, scheduler.oldest_s()) == (0, 0.0)
    counters = scheduler.counters
    assert (counters.passes, counters.rows, counters.capacity, counters.shares) == (2, 64, 64, 3)
    assert scheduler.shares(8) == [0.5, 0.25, 0.25]
    assert scheduler.shares(1) == [0.5]
