"""A forward and a backward pass in segments, a layer each, with other work between them.

A pass over many rows takes a CPU seconds; other work waits for one segment of it only. The bits are those of one
forward and one backward: a segment starts from the previous one's output, and is differentiated with the gradient that
the next one left there.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch
from torch import Tensor

from knapper.engine.executor import Work
from knapper.engine.layers import gradient

LayerSegment = Callable[[Tensor], Tensor]

HEAD_PART: Final = -1
# A layer by number, or the head, and 1 or -1, which part is needed next: a context in which its weights are whole.
Gather = Callable[[int, int], AbstractContextManager[None]]


def always_whole(_part: int, _step: int) -> AbstractContextManager[None]:
    """Of a model that is not spread."""
    return nullcontext()


class LayerwisePass:
    """One pass. The graph of a segment is kept until it is differentiated."""

    def __init__(self, *, differentiates: bool, gather: Gather = always_whole) -> None:
        self._differentiates, self._gather = differentiates, gather
        self._boundaries: list[
            tuple[int, Tensor, Tensor]
        ] = []  # a segment's number and output, and the leaf from which the next starts

    def forward(self, x: Tensor, layer_segments: Sequence[LayerSegment]) -> Work[Tensor]:
        """The last segment's output. It requires a gradient if it depends on a tensor that does."""
        for number, segment in enumerate(layer_segments):
            with self._gather(number, 1), torch.set_grad_enabled(self._differentiates):
                x = self._detached(number, segment(x))
            yield
        return x

    def backward(self, grad: Tensor) -> Work[None]:
        """Adds gradients to every leaf of the segments; `grad` is that of the output of `forward`."""
        if self._boundaries:
            self._boundaries[-1][2].grad = grad
        while self._boundaries:
            number, output, leaf = self._boundaries.pop()
            assert leaf.grad is not None, "the segment after it leaves one"
            with self._gather(number, -1):
                gradient.backward(output, leaf.grad)
            del output, leaf  # frees its part of the graph before the next segment is differentiated
            yield

    def _detached(self, number: int, output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        leaf = output.detach().requires_grad_()
        self._boundaries.append((number, output, leaf))
        return leaf
