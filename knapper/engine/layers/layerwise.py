"""A forward and a backward pass in stretches, a layer each, between which others compute.

A pass over many rows takes a CPU seconds. Whoever comes meanwhile waits for a stretch of it, and not for all. The bits
are those of one forward and one backward: a stretch begins with what the one before gave, and is differentiated with
the gradient that the one after left there.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from knapper.engine.executor import Work

Stretch = Callable[[Tensor], Tensor]


class LayerwisePass:
    """One pass. What is needed to differentiate a stretch is kept until that is done."""

    def __init__(self, *, differentiates: bool) -> None:
        self._differentiates = differentiates
        self._joints: list[tuple[Tensor, Tensor]] = []  # what a stretch gave, and the same as the next began with it

    def forward(self, x: Tensor, stretches: Sequence[Stretch]) -> Work[Tensor]:
        """What the last stretch gives. It requires a gradient where it depends on what does."""
        for stretch in stretches:
            with torch.set_grad_enabled(self._differentiates):
                x = self._joined(stretch(x))
            yield
        return x

    def backward(self, grad: Tensor) -> Work[None]:
        """Gradients to all that the stretches used; `grad` is that of what `forward` returned."""
        if self._joints:
            self._joints[-1][1].grad = grad
        while self._joints:
            given, taken = self._joints.pop()
            torch.autograd.backward(given, taken.grad)
            del given, taken  # its part of the graph is free before the next is differentiated
            yield

    def _joined(self, given: Tensor) -> Tensor:
        if not given.requires_grad:
            return given
        taken = given.detach().requires_grad_()
        self._joints.append((given, taken))
        return taken
