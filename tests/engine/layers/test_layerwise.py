"""Segments of a pass: the bits of one forward and one backward, and nothing kept of what is done."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from knapper.engine.layers.layerwise import LayerSegment, LayerwisePass
from tests.engine.runs import done


def layers(count: int) -> tuple[list[Tensor], list[LayerSegment]]:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(16, 16, generator=generator, requires_grad=True) for _ in range(count)]

    def layer(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: x + torch.tanh(x @ weight)  # used twice, as a layer of a transformer uses what it is given

    return weights, [layer(weight) for weight in weights]


def begin() -> Tensor:
    return torch.randn(7, 16, generator=torch.Generator().manual_seed(6))


def test_gradients_are_bit_for_bit_those_of_one_backward() -> None:
    (whole, one), (parts, layer_segments) = layers(6), layers(6)
    x = begin()
    for layer in one:
        x = layer(x)
    (x.square().sum()).backward()
    layer_pass = LayerwisePass(differentiates=True)
    rows = done(layer_pass.forward(begin(), layer_segments))
    assert torch.equal(rows, x)
    done(layer_pass.backward(2 * rows.detach()))
    for leaf, theirs in zip(parts, whole, strict=True):
        assert theirs.grad is not None
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, theirs.grad)


@pytest.mark.parametrize("trained", [0, 3, 5])
def test_what_is_frozen_before_the_first_trained_stretch_is_not_differentiated(trained: int) -> None:
    weights, layer_segments = layers(6)
    for weight in weights[:trained]:
        weight.requires_grad = False
    layer_pass = LayerwisePass(differentiates=True)
    rows = done(layer_pass.forward(begin(), layer_segments))
    assert len(list(layer_pass.backward(torch.ones_like(rows)))) == 6 - trained
    assert [weight.grad is not None for weight in weights] == [False] * trained + [True] * (6 - trained)


def test_forward_only_keeps_no_graph() -> None:
    _, layer_segments = layers(3)
    layer_pass = LayerwisePass(differentiates=False)
    rows = done(layer_pass.forward(begin(), layer_segments))
    assert not rows.requires_grad
    assert list(layer_pass.backward(torch.ones_like(rows))) == []


def test_others_compute_without_gradients_between_two_stretches() -> None:
    """How gradients are kept is the thread's, and other tasks are on it."""
    _, layer_segments = layers(3)
    for differentiates in (True, False):
        for _ in LayerwisePass(differentiates=differentiates).forward(begin(), layer_segments):
            assert torch.is_grad_enabled()


def test_what_a_stretch_kept_is_free_once_it_is_differentiated() -> None:
    graphs: list[weakref.ref[Tensor]] = []
    weight = torch.ones(16, requires_grad=True)

    def segment(x: Tensor) -> Tensor:
        y = x * weight
        graphs.append(weakref.ref(y))
        return y

    layer_pass = LayerwisePass(differentiates=True)
    rows = done(layer_pass.forward(begin(), [segment] * 3))
    gc.disable()
    try:
        for index, _ in enumerate(layer_pass.backward(torch.ones_like(rows))):
            assert [ref() is not None for ref in graphs] == [True] * (2 - index) + [False] * (index + 1)
    finally:
        gc.enable()
