"""Activation checkpointing (arXiv 1604.06174): a layer keeps its activations for the backward pass, or its input only.

Layers without activations are computed again before they are differentiated: the same operations on the same numbers,
so gradients are the same to the last bit, and the choice of layers may depend on the machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from knapper.engine.layers import gradient
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.layer import Layer

_saved_bytes_least: Final = (
    1024 << 20
)  # of a small model's layers at a time; a larger one's may take as much as its weights

LayerPass = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PassBytes:
    """The activations of one pass: `total` bytes, of which each row takes `row` in any case, and `layer_row` more in
    each layer that keeps its activations.
    """

    total: int
    row: int
    layer_row: int

    def layers_kept(self, rows: int) -> int:
        """Layers that keep their activations in a pass of so many rows."""
        spare = self.total - rows * self.row
        return max(0, spare) // (rows * self.layer_row) if self.layer_row else 0


def on_cpu(spare: int, weights_bytes: int, layer_row: int) -> PassBytes:
    """`spare`: bytes that the account of memory has for it. However few, small passes keep everything, and a large
    model's may keep as much as its weights take.
    """
    return PassBytes(max(_saved_bytes_least, weights_bytes, spare), 0, layer_row)


def saved_bytes_of_row(config: ModelConfig, size: int = 4) -> int:
    """Bytes that one row leaves in one layer, as `tests/engine/layers/test_checkpointing.py` measures them on a CPU,
    and the gate of `tests/engine/gate` for a GPU, whose dtype has `size` bytes.

    Rows of the residual's width (the norms' inputs, and the inputs of three linears), queries, keys, values,
    attention's outputs, and what the MLP says. In bfloat16 most of it is float32 all the same on a CPU; on a GPU two
    thirds remain.
    """
    wide = 4 * max(_numbers_of_row(layer, config.hidden) for layer in config.layers)
    return wide if size == 4 else 2 * wide // 3


def _numbers_of_row(layer: Layer, hidden: int) -> int:
    return (len(layer.parts) + len(list(layer.norms))) * hidden + layer.numbers_of_row(hidden)


def pass_bytes_of_row(config: ModelConfig, size: int) -> int:
    """Bytes that one row takes in a pass in which no layer but the first keeps its activations.

    The layers' inputs; the first layer's activations; those of the layer that is computed again, with its gradients.
    """
    return len(config.layers) * config.hidden * size + 3 * saved_bytes_of_row(config, size)


def checkpointed(layer: LayerPass, x_NH: Tensor, *, keep: bool) -> Tensor:
    """`layer(x_NH)`. Without `keep`, and where x_NH gets a gradient, only x_NH is kept.

    The first layer's input gets none, so that layer always keeps its activations.
    """
    if keep or not x_NH.requires_grad:
        return layer(x_NH)
    y_NH = _Checkpoint.apply(layer, x_NH)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(y_NH, Tensor)
    return y_NH


class _Checkpoint(torch.autograd.Function):
    """torch.utils.checkpoint does the same, but imports torch._dynamo on its first call: seconds and memory.

    The layer's own leaves get their gradients inside.
    """

    @staticmethod
    def forward(ctx: Any, layer: LayerPass, x_NH: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x_NH)
        return layer(x_NH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        (x_NH,) = ctx.saved_tensors
        x_NH = x_NH.detach().requires_grad_()
        with torch.enable_grad():
            y_NH = ctx.layer(x_NH)
        gradient.backward(y_NH, grads[0])
        return None, x_NH.grad
