"""Training on one card: tokens a second of whole steps, and their share of the card's peak."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.figures import Figure
from benchmarks.gpu import sampling
from benchmarks.gpu.rig import ADAM, Rig, noted, rate, request, texts
from benchmarks.gpu.work import peak_of, training_flops
from knapper.engine import checkpoint_format
from knapper.engine.models.config import ModelConfig
from knapper.wire.types import Datum

_SECTION = "training"


def packed(rig: Rig) -> Iterator[Figure]:
    """A request of packed texts, uneven ones, a long one; and the same pass twice."""
    yield _steps(rig, "packed texts", [rig.sizes.packed], ">= 7,000, goal 10,000", "12,400")
    yield _steps(rig, "texts of uneven lengths", [rig.sizes.ragged])
    yield _twice(rig)
    yield _steps(rig, "one long text", [rig.sizes.long])


def exact(rig: Rig) -> Iterator[Figure]:
    """In a process of its own, in which bits are kept: what it costs, and what it comes to."""
    for figures in (packed(rig), sampling.agreement(rig)):
        for figure in figures:
            yield replace(figure, section="with bits kept")


def tenants(rig: Rig) -> Iterator[Figure]:
    """Several runs, each with data of its own, whose passes are shared."""
    yield _steps(rig, "runs of uneven size", rig.sizes.tenants, ">= 5,000, goal 9,000", "within 10 % of one run")
    yield _steps(rig, "runs of one small text", rig.sizes.small_tenants, ">= 2x PEFT, goal 4x", "8x")


def _steps(rig: Rig, kind: str, lengths: Sequence[Sequence[int]], goal: str = "", stretch: str = "") -> Figure:
    data = [texts(of_run, seed) for seed, of_run in enumerate(lengths)]
    states = [rig.state(seed) for seed in range(len(lengths))]
    every = [length for of_run in lengths for length in of_run]
    with rig.peak() as peak:
        took_s = rig.median_s(lambda: rig.step(states, data))
        share = _share(rig, every, took_s)
        name = f"{kind}: {len(lengths)} run{'s' * (len(lengths) > 1)}, {sum(every):,} tokens"
        return rate(_SECTION, name, sum(every), took_s, goal, stretch, noted(share, peak(), f"a step {took_s:.3f} s"))


def _share(rig: Rig, lengths: Sequence[int], took_s: float) -> str:
    assert isinstance(rig.model.config, ModelConfig)
    tflops = training_flops(rig.model.config, lengths, rig.sizes.rank) / took_s / 1e12
    said = peak_of(torch.cuda.get_device_name()) if rig.device_now.type == "cuda" else None
    return f"{tflops:.3g} TFLOP/s" + ("" if said is None else f", {tflops / said:.0%} of {said:g}")


def _twice(rig: Rig) -> Figure:
    """The same pass twice: are its gradients equal? And in company, and alone?"""
    data, other = texts(rig.sizes.packed, 0), texts(rig.sizes.ragged, 1)
    states = [rig.state(seed) for seed in range(2)]

    def gradient(*each: list[Datum]) -> torch.Tensor:
        futures = [
            rig.scheduler.submit(state, partial(request, one, state.spec.run))
            for state, one in zip(states, each, strict=False)
        ]
        first, *_ = (future.result()[0] for future in futures)
        assert first.grads_P is not None
        return first.grads_P

    alone, again, beside = gradient(data), gradient(data), gradient(data, other)
    apart, crowd = (float((alone - one).norm() / alone.norm()) for one in (again, beside))
    note = f"beside another run {crowd:.1e}"
    return Figure(_SECTION, "the same gradient twice, relative difference", apart, None, "", note=note)


def kept(rig: Rig) -> Iterator[Figure]:
    """What a step, a save and a snapshot cost without a journal."""
    before, data = rig.state(), texts(rig.sizes.packed, 0)
    state = rig.scheduler.submit(before, lambda: request(data, before.spec.run)).result()[0]
    with rig.peak() as peak:
        took_s = rig.median_s(lambda: rig.engine.executor.submit(rig.trainer.optim_step(state, ADAM)).result())
        yield _ms("optimizer step", took_s, noted(f"{state.weights_P.nbytes / 1e6:.0f} MB of weights", peak()))
    works: dict[str, Callable[[], object]] = {
        "export for a sampler": lambda: checkpoint_format.export(state, with_optimizer=False),
        "export with the optimizer": lambda: checkpoint_format.export(state, with_optimizer=True),
        "freeze for a snapshot": lambda: checkpoint_format.freeze(state),
    }
    for name, work in works.items():
        yield _ms(name, rig.median_s(partial(rig.done, work)))
    yield _ms("handed to a sampler on the device", rig.median_s(lambda: rig.adapter(state)))


def _ms(name: str, took_s: float, note: str = "") -> Figure:
    return Figure("steps and saves", name, 1000 * took_s, None, "ms", note=note)
