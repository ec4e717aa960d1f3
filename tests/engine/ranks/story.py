"""What the tests of ranks compute, in a process of its own: `python -m tests.engine.ranks.story MODEL DEVICES OUT`.

It is rank 0, and starts the others as an engine does. OUT gets arrays and texts by name. With one device the model is
not spread.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor.debug import CommDebugMode

from knapper.engine.executor import Executor, Work
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.layerwise import HEAD_PART
from knapper.engine.models.loader import load
from knapper.engine.ranks.leader import Leader
from knapper.engine.ranks.start import start
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.errors import UserError
from knapper.settings import Settings
from knapper.wire.types import AdamW, Datum, ForwardBackward
from tests.engine.runs import datum, done, request, spec

ROWS = 64  # of a micro-batch: a request of a few texts has several
RANKS = range(1, 18)
LOSS = "importance_sampling"


def run(model: Path, devices: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    if devices == 1:
        return told(Trainer(load(model), ROWS), None)
    values = {"KNAPPER_DEVICES": str(devices), "KNAPPER_MODEL_DIRECTORY": str(model), "KNAPPER_DEVICE": "cpu"}
    os.environ |= values
    spread, leader = start(Settings.load(os.environ), torch.float32, torch.device("cpu"), Exactness(), time.monotonic)
    try:
        return told(Trainer(spread, ROWS, None, leader), leader)
    finally:
        leader.close()


def texts(seed: int, lengths: tuple[int, ...]) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [datum(length, LOSS, rng) for length in lengths]


def told(trainer: Trainer, leader: Leader | None) -> dict[str, Any]:
    device = Executor()
    scheduler = TrainingScheduler(trainer, device, time.monotonic)

    def submit(state: RunState, body: ForwardBackward) -> Any:
        return scheduler.submit(state, lambda: body)

    found: dict[str, Any] = {}
    runs = {rank: trainer.create(spec(run=f"run-{rank}", rank=rank, train_unembed=rank % 2 == 0)) for rank in RANKS}
    bodies = {rank: request(texts(rank, (40 + rank, 30, 50, 20 + rank)), LOSS) for rank in RANKS}

    futures = {rank: submit(runs[rank], bodies[rank]) for rank in RANKS}
    for rank, future in futures.items():
        found |= named(f"crowd {rank}", future.result(120))
    for rank in (1, 8, 17):
        found |= named(f"alone {rank}", submit(runs[rank], bodies[rank]).result(120))

    state = runs[5]
    for step in range(3):
        state, _, _ = submit(state, request(texts(100 + step, (60, 33, 47, 21, 55)), LOSS)).result(120)
        state, _ = done(trainer.optim_step(state, AdamW(learning_rate=1e-2)))
    found["steps weights"] = state.weights_P.numpy()
    found |= named("forward only", submit(state, request(texts(7, (50, 60, 40)), LOSS, forward_only=True)).result(120))

    if leader is not None:
        found["adapters sent for two small requests"] = adapters_sent(device, submit, state, leader)

    wrong = texts(9, (60, 50, 40))
    wrong[1].inputs["advantages"][:] = 3e38
    try:
        submit(state, request(wrong, LOSS)).result(120)
    except UserError as error:
        found["error"] = str(error)
    found |= named("after the error", submit(state, bodies[3]).result(120))

    device.close()
    if leader is not None:
        found |= counted(trainer, leader, state)
    return found


def adapters_sent(device: Executor, submit: Callable[..., Any], state: RunState, leader: Leader) -> float:
    """For two requests that come while the device is busy, and have room in one lane together."""
    go_on = threading.Event()

    def busy() -> Work[None]:
        yield
        go_on.wait(60)

    held = device.submit(busy())
    before = leader.group.traffic.sent_bytes
    futures = [submit(state, request(texts(20 + n, (12,)), LOSS)) for n in range(2)]
    go_on.set()
    for future in [held, *futures]:
        future.result(120)
    return (leader.group.traffic.sent_bytes - before) // state.weights_P.nbytes


def named(name: str, result: tuple[RunState, Any, float]) -> dict[str, Any]:
    state, output, _ = result
    logprobs = np.concatenate([each["logprobs"].ravel() for each in output.outputs])
    grads = {} if state.grads_P is None else {f"{name} grads": state.grads_P.numpy()}
    return {f"{name} logprobs": logprobs, f"{name} metrics": repr(sorted(output.metrics.items())), **grads}


def counted(trainer: Trainer, leader: Leader, state: RunState) -> dict[str, Any]:
    """What a pass of a micro-batch for each of two ranks asks of the connection, and in what order."""
    pending = trainer.open(state, request(texts(11, (60, 50)), LOSS))
    assert len(pending.waiting) == 2
    before = asdict(leader.group.traffic) | {"gathers": leader.shards.counts.calls, "whole": leader.shards.counts.bytes}
    with noted(leader) as order, CommDebugMode() as calls:
        done(trainer.compute([[(state, pending)], [(state, pending)]]))
    after = asdict(leader.group.traffic) | {"gathers": leader.shards.counts.calls, "whole": leader.shards.counts.bytes}
    found = {f"count {name}": value - before[name] for name, value in after.items()}
    found |= {f"calls {op}".replace("c10d.", ""): count for op, count in calls.get_comm_counts().items()}
    return found | {
        "order": " ".join(order), "arena": state.weights_P.nbytes, "layers": len(leader.shards.sizes) - 1,
        "weights": leader.shards.nbytes, "head": leader.shards.sizes[HEAD_PART],
    }  # fmt: skip


@contextmanager
def noted(leader: Leader) -> Iterator[list[str]]:
    """The parts, as they are begun (+), waited for (!) and given back (-)."""
    order: list[str] = []
    shards = leader.shards
    marks = {"begin": "+", "wait": "!", "release": "-"}
    for name, mark in marks.items():

        def note(part: int, name: str = name, mark: str = mark) -> None:
            order.append(f"{mark}{part}")
            getattr(type(shards), name)(shards, part)

        setattr(shards, name, note)
    yield order
    for name in marks:
        delattr(shards, name)


if __name__ == "__main__":
    torch.save(run(Path(sys.argv[1]), int(sys.argv[2])), sys.argv[3])
    os._exit(0)  # without waiting for what the interpreter takes down
