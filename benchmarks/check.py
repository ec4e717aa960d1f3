"""`python -m benchmarks.check`: has an optimisation been lost? Under a minute, on any machine, however busy.

Work that is counted (rows, passes, decoding steps, objects and bytes stored, modules imported) and one ratio of times
taken in turns, each against its floor or ceiling in floors.json. Seconds are never compared. All of it in float32, on
both sides of the ratio and whatever `auto` takes here, so that every CPU has the same floors.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import tinker
import torch
from tinker import types

from benchmarks.bare import Bare
from benchmarks.figures import paired
from benchmarks.operations import NoAdapters
from benchmarks.train_steps import UNEVEN, texts
from knapper.engine.executor import Executor
from knapper.engine.models.base import Model
from knapper.engine.models.loader import load
from knapper.engine.sampling.sampler import EngineSampler
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.engine.training.trainer import RunState, Trainer
from knapper.state.journal.records import Spec
from knapper.wire.types import AdamW, Datum, ForwardBackward, SampleRequest, SamplingParams
from tests.conformance.server import Server
from tests.engine.tiny import tiny_model

FLOORS = Path(__file__).parent / "floors.json"
VOCABULARY = 200
DTYPE = torch.float32
Values = dict[str, float]


def lost(values: Mapping[str, float], floors: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Values outside of their bounds, in words; values and bounds must have the same names."""
    complaints = [f"{name}: has no floor in {FLOORS.name}" for name in values.keys() - floors.keys()]
    for name, bound in floors.items():
        if name not in values:
            complaints.append(f"{name}: was not measured")
        elif values[name] > bound.get("at_most", float("inf")) or values[name] < bound.get("at_least", float("-inf")):
            limits = " and ".join(f"{kind.replace('_', ' ')} {bound[kind]:g}" for kind in bound if kind != "holds")
            complaints.append(f"{name}: {values[name]:.4g}, and must be {limits}; it holds {bound['holds']}")
    return complaints


def computed(model: Path) -> Values:
    """Rows, passes and steps, by the engine's own counters."""
    counted = _CountedHead(load(model, DTYPE))
    trainer, device = Trainer(cast(Model, counted)), Executor("check")
    try:
        prompt, tails = [7] * 96, texts([32] * 8, vocabulary=VOCABULARY)
        group = [_datum(prompt + tail) for tail in tails]
        alone = TrainingScheduler(trainer, device, lambda: 0.0)
        alone.submit(_run(trainer, "group"), lambda: _request(group)).result()
        scheduler, counted.heads = TrainingScheduler(trainer, device, lambda: 0.0), 0
        _together(
            scheduler, device, [(_run(trainer, str(n)), _request([_datum(tail)])) for n, tail in enumerate(tails)]
        )
        in_head = counted.heads
        sampler = EngineSampler(
            trainer.decoder, device, NoAdapters(), None, slots_max=8, kv_tokens_max=8192, now=time.monotonic
        )
        sample_request = SampleRequest(
            "", "", np.array(prompt, np.int32), SamplingParams(max_tokens=16), num_samples=8, seed=0
        )
        asyncio.run(sampler.sample(sample_request))
    finally:
        device.close()
    tokens = sum(len(datum.tokens) for datum in group)
    return {
        "tokens of a group over rows computed": tokens / alone.counters.rows,
        "passes for 8 runs": scheduler.counters.passes,
        "rows in a pass of 8 runs": scheduler.counters.rows / scheduler.counters.passes,
        "passes of the head for 8 runs": in_head,
        "prompt tokens prefilled for 8 samples of 96": sampler.counters.prefilled_tokens,
        "decoding steps for 8 samples of 16": sampler.counters.steps,
    }


def uneven(model: Path) -> Values:
    """The step on texts of 20 to 400 tokens, packed, against the padded loop."""
    trainer, bare = Trainer(load(model, DTYPE)), Bare(model, dtype=DTYPE)
    data = texts(UNEVEN, vocabulary=VOCABULARY)
    weights = [[1.0] * len(sequence) for sequence in data]
    state, request = _run(trainer, "uneven"), _request([_datum(sequence) for sequence in data])

    def ours() -> None:
        after, _ = _done(trainer.forward_backward(state, request))
        _done(trainer.optim_step(after, AdamW(learning_rate=1e-4)))

    pair = paired(ours, lambda: bare.step(data, weights), repeats=7, warm_up=2)
    return {"uneven texts, packed against padded": pair.bare_s / pair.ours_s}


def stored(model: Path, data: Path, steps: int = 20) -> Values:
    """Objects and bytes that a training step leaves in the store, through the whole server."""
    with Server.start(model, data, dtype="float32") as server:
        service = tinker.ServiceClient(base_url=server.url, api_key="tml-local")
        client = service.create_lora_training_client(str(model), rank=4, seed=1).result()
        sent = types.Datum(
            model_input=types.ModelInput.from_ints(list(range(12))),
            loss_fn_inputs={"target_tokens": list(range(1, 13)), "weights": [1.0] * 12},
        )
        before = _objects(data / "store")
        for _ in range(steps):
            first = client.forward_backward([sent], "cross_entropy")
            client.optim_step(types.AdamParams()).result()
            first.result()
        after = _objects(data / "store")
        service.close("success").result()
    return {
        "objects stored for a step": (after[0] - before[0]) / steps,
        "KB stored for a step": (after[1] - before[1]) / steps / 1000,
    }


def imported() -> Values:
    """Modules that a process imports before it can answer."""
    return {
        "modules that the engine imports": _modules("knapper.serving.engine"),
        "modules that the gateway imports": _modules("gateway.app"),
        "torch in the gateway": _modules("gateway.app", "torch"),
        "transformers in the engine": _modules("knapper.serving.engine", "transformers"),
    }


def _modules(module: str, under: str = "") -> int:
    code = "import sys, importlib; importlib.import_module(sys.argv[1]); print('\\n'.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True, check=True)
    names = ran.stdout.splitlines()
    return sum(name == under or name.startswith(f"{under}.") for name in names) if under else len(names)


class _CountedHead:
    """A model that counts training's calls of its head."""

    def __init__(self, model: Model) -> None:
        self.heads = 0
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def target_logprobs(self, *args: Any) -> torch.Tensor:
        self.heads += 1
        return self._model.target_logprobs(*args)


def _objects(store: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in store.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def _run(trainer: Trainer, name: str) -> RunState:
    spec = Spec(
        run=name, tenant="local", base_model="", rank=8, alpha=32.0, seed=1,
        train_attn=True, train_mlp=True, train_unembed=False,
    )  # fmt: skip
    return trainer.create(spec)


def _datum(tokens: list[int]) -> Datum:
    targets = np.array(tokens[1:], np.int64)
    inputs: dict[str, np.ndarray] = {"target_tokens": targets, "weights": np.ones(targets.size, np.float32)}
    return Datum(np.array(tokens[:-1], np.int32), inputs)


def _request(data: list[Datum]) -> ForwardBackward:
    return ForwardBackward("check", 1, data, "cross_entropy", {}, False)


def _together(scheduler: TrainingScheduler, device: Executor, requests: list[tuple[RunState, ForwardBackward]]) -> None:
    """Submit all before the first pass starts."""
    submitted: list[Future[Any]] = []

    def arrive() -> Any:
        submitted.extend(scheduler.submit(state, partial(_same, request)) for state, request in requests)
        yield

    device.submit(arrive()).result()
    for future in submitted:
        future.result()


def _same(request: ForwardBackward) -> ForwardBackward:
    return request


def _done(task: Any) -> Any:
    try:
        while True:
            next(task)
    except StopIteration as stop:
        return stop.value


def main() -> int:
    torch.set_num_threads(1)
    floors = json.loads(FLOORS.read_text())
    with tempfile.TemporaryDirectory(prefix="knapper-check-") as scratch:
        model = tiny_model(Path(scratch) / "model")
        parts: list[Callable[[], Values]] = [
            lambda: computed(model), lambda: stored(model, Path(scratch) / "data"), imported, lambda: uneven(model),
        ]  # fmt: skip
        values: Values = {}
        for part in parts:
            values |= part()
        if any(name.startswith("uneven") for name in lost(values, floors)):
            values |= uneven(model)  # a time, which other processes disturb: measured once more
    for name, value in values.items():
        print(f"{name:50}{value:>10.4g}")
    for complaint in lost(values, floors):
        print(f"lost: {complaint}", file=sys.stderr)
    return 1 if lost(values, floors) else 0


if __name__ == "__main__":
    sys.exit(main())
