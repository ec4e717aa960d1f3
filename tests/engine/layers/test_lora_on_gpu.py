"""What a GPU computes of adapters, on this CPU: the same numbers as the float32 reference, in 16 bits nearly."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from knapper.engine.layers import lora_on_gpu
from knapper.engine.layers.determinism import keep_bits_on_gpu, keeps_bits
from knapper.engine.layers.head import HeadLora, _back, _back_in_base_dtype
from knapper.engine.layers.linear import FrozenLinear
from knapper.engine.layers.lora import Lora
from knapper.engine.layers.lora_grouped import Segment, Segments, _Adapted
from knapper.engine.layers.lora_on_gpu import AdaptedOnGpu

Adapted = tuple[int, int, int, float, tuple[str, ...]]  # rows from and to, rank, scale, targets
NAMES = ("q", "k")
WIDTHS = (48, 24)
INPUTS = 32


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _lora(rank: int, scale: float, names: tuple[str, ...], dtype: torch.dtype, seed: int) -> Lora:
    a = {name: (_random(rank, INPUTS, seed=seed) * 0.2).requires_grad_() for name in names}
    b = {name: (_random(WIDTHS[NAMES.index(name)], rank, seed=seed) * 0.2).requires_grad_() for name in names}
    rounded = Lora(
        {n: x.detach().to(dtype) for n, x in a.items()}, {n: x.detach().to(dtype) for n, x in b.items()}, scale
    )
    return Lora(a, b, scale, rounded)


def _results(way: Any, dtype: torch.dtype, segments: list[Adapted]) -> list[Tensor]:
    """Outputs and all gradients of a linear with adapters, computed by `way`."""
    linear = FrozenLinear([_random(width, INPUTS).to(dtype) for width in WIDTHS], dtype, pack=False)
    loras = [_lora(rank, scale, names, dtype, n) for n, (_, _, rank, scale, names) in enumerate(segments)]
    rows = Segments([Segment(start, stop, lora) for (start, stop, *_), lora in zip(segments, loras, strict=True)])
    x_NI = _random(40, INPUTS).to(dtype).requires_grad_()
    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr("knapper.engine.layers.lora_grouped._Adapted", way)
        parts = rows(NAMES, x_NI, linear)
    torch.autograd.backward(list(parts), [_random(*part.shape, seed=9).to(dtype) for part in parts])
    leaves = [x_NI, *(leaf for lora in loras for leaf in (*lora.a.values(), *lora.b.values()))]
    return [
        *(part.detach().float() for part in parts),
        *(leaf.grad.float() for leaf in leaves if leaf.grad is not None),
    ]


CASES: dict[str, list[Adapted]] = {
    "one run": [(0, 40, 8, 1.0, NAMES)],
    "runs of several ranks and scales": [(0, 7, 8, 2.0, NAMES), (7, 30, 20, 0.5, NAMES), (30, 40, 16, 1.0, NAMES)],
    "other targets, and rows of the base model": [
        (0, 9, 8, 1.0, ("q",)),
        (9, 20, 8, 1.0, NAMES),
        (25, 40, 4, 3.0, ("k",)),
    ],
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_values_and_gradients_are_those_of_the_reference(case: str, dtype: torch.dtype, near: float) -> None:
    found, true = (_results(way, dtype, CASES[case]) for way in (AdaptedOnGpu, _Adapted))
    assert len(found) == len(true)
    for one, other in zip(found, true, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= near * float(other.abs().max())


def test_runs_of_the_same_targets_share_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    plain = torch.nn.functional.grouped_mm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(kwargs["offs"]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counted)
    _results(AdaptedOnGpu, torch.bfloat16, CASES["runs of several ranks and scales"])
    assert calls == [3] * 9, "one for A, and one for each part's B; backward three times that"
    calls.clear()
    _results(AdaptedOnGpu, torch.bfloat16, CASES["other targets, and rows of the base model"])
    assert calls == []


def test_grouped_products_are_those_of_the_reference_for_groups_of_any_size() -> None:
    assert lora_on_gpu._is_right(torch.device("cpu"))


def test_wrong_grouped_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda x, w, offs: plain(x, w, offs=offs).roll(1, 0))
    assert not lora_on_gpu._is_right(torch.device("cpu"))


def test_the_heads_gradients_are_those_of_the_reference() -> None:
    head = FrozenLinear([_random(90, 32).bfloat16()], torch.bfloat16, pack=False)
    lora = HeadLora(_random(8, 32), _random(90, 8), 0.5)
    grad_CV, h_CH = _random(12, 90), _random(12, 32).bfloat16()
    found, true = ([torch.zeros_like(lora.a), torch.zeros_like(lora.b)] for _ in range(2))
    rows = [back(grad_CV, h_CH, head, lora, *of) for back, of in ((_back_in_base_dtype, found), (_back, true))]
    for one, other in zip([rows[0], *found], [rows[1], *true], strict=True):
        assert float((one.float() - other.float()).abs().max()) <= 0.02 * float(other.abs().max())


@pytest.fixture
def _as_before() -> Iterator[None]:
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.usefixtures("_as_before")
def test_a_gpu_that_keeps_bits_computes_as_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert keeps_bits(torch.device("cpu"))
    assert not keeps_bits(gpu)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # and unset at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    keep_bits_on_gpu()
    assert keeps_bits(gpu)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8", "cuBLAS may else add in any order"
