"""Training keeps more activations while vLLM sleeps, and has given the memory back before vLLM wakes."""

import asyncio
import threading
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from knapper.engine.executor import Executor, Work
from knapper.engine.models.decoder import Decoder
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.serving.handover import Handover, handover
from knapper.serving.lent_memory import LentMemory, borrow
from knapper.settings import Settings
from tests.engine.gpu import GIB, Driver, with_gpu
from tests.engine.runs import datum, request, spec, tiny_trainer

PARTS = {"KNAPPER_SAMPLER": "vllm", "KNAPPER_GPU_MEMORY_SHARE": "0.45", "KNAPPER_VLLM_MEMORY": "0.5"}


def test_memory_is_lent_from_the_next_pass_on_and_returned_once_the_pass_under_way_has_ended(tmp_path: Path) -> None:
    trainer, executor, begin = tiny_trainer(tmp_path), Executor(), threading.Event()
    decoder = trainer.decoder
    assert isinstance(decoder, Decoder)
    scheduler, between, own = TrainingScheduler(trainer, executor, time.monotonic), Handover(), decoder.passes

    def waits() -> Work[None]:
        yield from ()
        assert begin.wait(30)

    async def story() -> None:
        await between.lend()  # nobody trains in this process
        await between.reclaim()
        between.lends_to(LentMemory(executor, scheduler, decoder, share=1.0, lent=0.0, lent_bytes=1000))
        await between.lend()
        assert decoder.passes.total == own.total + 1000
        assert decoder.passes.layers_kept(1) >= own.layers_kept(1)
        executor.submit(waits())
        step = scheduler.submit(
            trainer.create(spec()), lambda: request([datum(20, "ppo", np.random.default_rng(0))], "ppo")
        )
        reclaimed = asyncio.ensure_future(between.reclaim())
        await asyncio.sleep(0)  # until it waits for its turn
        begin.set()
        await reclaimed
        assert decoder.passes == own
        assert scheduler.counters.passes == 1, "the pass has ended: its activations are free"
        assert step.result(30)

    try:
        asyncio.run(story())
    finally:
        begin.set()
        executor.close()


def test_on_a_gpu_the_cap_of_this_process_moves_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own Python, over a driver that is a stub."""
    driver, trainer, executor = Driver(total=80 * GIB), tiny_trainer(tmp_path), Executor()
    with_gpu(monkeypatch, driver)
    decoder = trainer.decoder
    assert isinstance(decoder, Decoder)
    scheduler = TrainingScheduler(trainer, executor, time.monotonic)
    settings, own = Settings.load(PARTS), decoder.passes

    async def story() -> None:
        borrow(settings, executor, scheduler, decoder)
        await handover().lend()
        assert decoder.passes == own, "not without a GPU"
        monkeypatch.setattr(decoder, "device", torch.device("cuda", 0))
        borrow(msgspec.structs.replace(settings, sampler="torch"), executor, scheduler, decoder)
        await handover().lend()
        assert decoder.passes == own, "not without vLLM"
        borrow(settings, executor, scheduler, decoder)
        await handover().lend()
        assert driver.capped[0] == pytest.approx(0.45 + 0.85 * 0.5)
        assert decoder.passes.total - own.total == int(0.85 * 0.5 * 80 * GIB)
        await handover().reclaim()
        assert (driver.capped[0], decoder.passes, driver.emptied) == (0.45, own, 1)

    handover.cache_clear()
    try:
        asyncio.run(story())
    finally:
        handover.cache_clear()
        executor.close()
