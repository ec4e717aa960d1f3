"""How often a device would have to be waited for: a few times a request, never for each layer, row or datum.

Counted on a CPU, where waiting costs nothing: calls that need a value of a tensor in Python (item, tolist, numpy, bool)
and operations whose result's shape depends on values (nonzero, indexing by a mask).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from knapper.engine.layers import head
from knapper.engine.training import batch
from knapper.engine.training.trainer import RunState, Trainer
from knapper.wire.types import AdamW
from tests.engine.runs import datum, done, request, spec, tiny_trainer
from tests.engine.sampling.test_scheduler import House, prompt_of
from tests.engine.sampling.test_scheduler import request as sample_request

_BY_VALUE = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim"}
_IN_PYTHON = ("tolist", "numpy", "cpu")  # on a CPU these never reach the dispatcher


class _Operations(TorchDispatchMode):
    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library has no types here
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = name.startswith("aten::index") and len(args) > 1 and isinstance(args[1], list | tuple)
        if name in _BY_VALUE or (masks and any(one is not None and one.dtype == torch.bool for one in args[1])):
            self._seen[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    seen: Counter[str] = Counter()

    def counting(name: str, original: Any) -> Any:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen[name] += 1
            return original(tensor, *args, **kwargs)

        return call

    with monkeypatch.context() as patch, _Operations(seen):
        for name in _IN_PYTHON:
            patch.setattr(torch.Tensor, name, counting(name, getattr(torch.Tensor, name)))
        yield seen


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return tiny_trainer(tmp_path_factory.mktemp("model"))


def _pass(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, loss: str, datums: int, rows: int, prompt: int = 0
) -> Counter[str]:
    rng = np.random.default_rng(0)
    data = [datum(rows, loss, rng, prompt=prompt) for _ in range(datums)]
    one = trainer.open(trainer.create(spec()), request(data, loss))
    with counted(monkeypatch) as seen:
        done(batch.compute(trainer.decoder, [one]))
    return seen


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro"])
def test_a_pass_waits_as_often_for_many_datums_and_rows_as_for_one(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    few = _pass(trainer, monkeypatch, loss, 1, 20, prompt=4)
    many = _pass(trainer, monkeypatch, loss, 9, 50, prompt=4)
    assert many == few
    assert few.total() <= 8, few


def test_a_pass_waits_as_often_for_many_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(tmp_path / "model")
    weights = trainer.decoder.weights  # type: ignore[attr-defined]
    before = _pass(trainer, monkeypatch, "cross_entropy", 2, 20)
    object.__setattr__(weights, "layers", weights.layers[:1])
    assert _pass(trainer, monkeypatch, "cross_entropy", 2, 20) == before


def test_several_runs_in_a_pass_wait_as_often_each_as_one(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def together(runs: int) -> Counter[str]:
        rng = np.random.default_rng(0)
        requests = [request([datum(20 + run, "ppo", rng, prompt=4)], "ppo") for run in range(runs)]
        ones = [trainer.open(trainer.create(spec(rank=4 + run)), each) for run, each in enumerate(requests)]
        with counted(monkeypatch) as seen:
            done(batch.compute(trainer.decoder, ones))
        return seen

    alone = together(1).total()
    for runs in (3, 7):
        assert together(runs).total() <= runs * alone


def test_a_head_in_chunks_waits_as_often_as_a_whole_one(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _pass(trainer, monkeypatch, "cross_entropy", 9, 50, prompt=4)
    monkeypatch.setattr(head, "ELEMENTS_MAX", 1)  # chunks of 16 rows
    assert _pass(trainer, monkeypatch, "cross_entropy", 9, 50, prompt=4) == whole


@pytest.mark.parametrize("adapters", [0, 1, 3])
def test_a_decoding_step_waits_for_its_tokens_only(tmp_path: Path, adapters: int) -> None:
    """However many sequences it serves, and however long they are."""
    for sequences in (2, 11):
        steps = _steps(tmp_path / str(sequences), sequences, adapters)
        assert max(each.total() for each in steps) <= 3, steps  # tokens, log-probabilities, whether they are finite


def _steps(directory: Path, sequences: int, adapters: int) -> list[Counter[str]]:
    """Of each decoding step of so many sequences, with so many adapters and the base model."""
    house = House(directory)
    seen: list[Counter[str]] = []
    step = house.sampler._scheduler._step

    def counting() -> None:
        with pytest.MonkeyPatch.context() as patch, counted(patch) as counts:
            seen.append(counts)  # before the step: it returns results, and nothing waits for more
            step()

    house.sampler._scheduler._step = counting  # type: ignore[method-assign]  # the device's thread calls it
    names = [*(f"adapter-{number + 1}" for number in range(adapters)), ""]
    house.run(
        *(
            sample_request(adapter=names[n % len(names)], prompt=prompt_of(9 + n), seed=n, max_tokens=12)
            for n in range(sequences)
        )
    )
    assert len(seen) == house.sampler.counters.steps > 10
    return seen


def test_an_optimizer_step_waits_for_its_norms_only(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trainer.create(spec())
    ready = RunState(state.spec, state.layout, state.weights_P, state.moments, torch.ones_like(state.weights_P))
    with counted(monkeypatch) as seen:
        done(trainer.optim_step(ready, AdamW(learning_rate=1e-3, grad_clip_norm=1.0)))
    assert seen == {"tolist": 2}  # the gradient; then the weights and both moments together
