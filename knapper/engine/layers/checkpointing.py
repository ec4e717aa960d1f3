"""What the forward pass keeps of a layer for the backward pass, and when it keeps the layer's input alone.

Layers whose activations are not kept are computed again before they are differentiated: the same operations on the same
numbers, so that gradients are the same to the last bit, and which layers they are may depend on the machine.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from knapper.engine.models.config import ModelConfig

_saved_bytes_least: Final = 1024 << 20  # of a small model's layers at a time; of a larger one's, as much as its weights
_gpu_part: Final = 4  # of a GPU's memory: at most 1 / so much

Layer = Callable[[Tensor], Tensor]


def saved_bytes_max(weights_bytes: int, device: torch.device) -> int:
    """How much one pass may keep of its layers."""
    most = max(_saved_bytes_least, weights_bytes)
    if device.type != "cuda":
        return most
    return min(most, int(torch.cuda.get_device_properties(device).total_memory) // _gpu_part)


def saved_bytes_of_row(config: ModelConfig) -> int:
    """What one row leaves in one layer, as `tests/engine/layers/test_checkpointing.py` measures it.

    Five rows of the residual's width (both norms' inputs, and the inputs of three linears), queries, keys, values,
    attention's outputs, and four of the MLP's width. In bfloat16 most of it is float32 all the same.
    """
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return 4 * (5 * config.hidden + 2 * q + 2 * kv + 4 * config.intermediate)


def checkpointed(layer: Layer, x_NH: Tensor, *, keep: bool) -> Tensor:
    """`layer(x_NH)`. Without `keep`, and where x_NH has a gradient to come, only x_NH is kept.

    So the first layer, whose input has none, always keeps what it needs.
    """
    if keep or not x_NH.requires_grad:
        return layer(x_NH)
    y_NH = _Checkpoint.apply(layer, x_NH)  # type: ignore[no-untyped-call]  # the library has no types here
    assert isinstance(y_NH, Tensor)
    return y_NH


class _Checkpoint(torch.autograd.Function):
    """torch.utils.checkpoint does this too, and imports torch._dynamo when it is first called: seconds and memory.

    The layer's own leaves get their gradients inside.
    """

    @staticmethod
    def forward(ctx: Any, layer: Layer, x_NH: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x_NH)
        return layer(x_NH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        (x_NH,) = ctx.saved_tensors
        x_NH = x_NH.detach().requires_grad_()
        with torch.enable_grad():
            y_NH = ctx.layer(x_NH)
        torch.autograd.backward(y_NH, grads[0])
        return None, x_NH.grad
