"""A forward and a backward pass in stretches, a layer each, between which others compute.

A pass over many rows takes a CPU seconds. Whoever comes meanwhile waits for a stretch of it, and not for all. The bits
are those of one forward and one backward: a stretch begins with what the one before gave, and is differentiated with
the gradient that the one after left there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from knapper.engine.executor import Work

LayerSegment = Callable[[Tensor], Tensor]


class LayerwisePass:
    """One pass. What is needed to differentiate a stretch is kept until that is done."""

    def __init__(self, *, differentiates: bool) -> None:
        self._differentiates = differentiates
        self._boundaries: list[
            tuple[Tensor, Tensor]
        ] = []  # what a stretch gave, and the same as the next began with it

    def forward(self, x: Tensor, layer_segments: Sequence[LayerSegment]) -> Work[Tensor]:
        """What the last stretch gives. It requires a gradient where it depends on what does."""
        for segment in layer_segments:
            with torch.set_grad_enabled(self._differentiates):
                x = self._detached(segment(x))
            yield
        return x

    def backward(self, grad: Tensor) -> Work[None]:
        """Gradients to all that the stretches used; `grad` is that of what `forward` returned."""
        if self._boundaries:
            self._boundaries[-1][1].grad = grad
        while self._boundaries:
            output, leaf = self._boundaries.pop()
            torch.autograd.backward(output, leaf.grad)
            del output, leaf  # its part of the graph is free before the next is differentiated
            yield

    def _detached(self, output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self._boundaries.append((output, leaf))
        return leaf
