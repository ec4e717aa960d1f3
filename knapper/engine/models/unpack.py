"""Packed weights as plain ones: what `packed` describes, in the dtype that computes. One tensor at a time.

E experts, O outputs, I inputs, G blocks of a row.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.models.packed import MX_BLOCK, PackedTensor

Take = Callable[[str], Tensor]  # a part, by the end of its name

_FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1
_SCALE_BIAS: Final = 127  # of E8M0


def unpacked(tensor: PackedTensor, take: Take, dtype: torch.dtype) -> Tensor:
    """Of `tensor.shape`. fp8 is rounded once to `dtype`; four bits and a power of two fit bfloat16 exactly, and stay
    in it.
    """
    if tensor.packing.method == "mxfp4":
        return mxfp4(take("_blocks"), take("_scales")).transpose(1, 2)
    return fp8(take(""), take("_scale_inv"), tensor.packing.block, dtype)


def mxfp4(blocks_EOG16: Tensor, scales_EOG: Tensor) -> Tensor:
    """bfloat16 (E, O, I): the low half of a byte, then the high one, times 2^(scale - 127).

    Source: OCP Microscaling Formats (MX) 1.0, sections 5.3.3 and 5.4.1. An expert at a time, as its halves are looked
    up by indices of four times their bytes.
    """
    experts, outputs, groups, _ = blocks_EOG16.shape
    halves = torch.tensor([[_FP4[byte & 15], _FP4[byte >> 4]] for byte in range(256)], dtype=torch.bfloat16)
    halves = halves.to(blocks_EOG16.device)
    out_EOI = torch.empty(experts, outputs, groups * MX_BLOCK, dtype=torch.bfloat16, device=blocks_EOG16.device)
    for out_OI, blocks_OG16, scales_OG in zip(out_EOI, blocks_EOG16, scales_EOG, strict=True):
        numbers_OGB = F.embedding(blocks_OG16.int(), halves).flatten(2)
        scale_OG1 = torch.exp2(scales_OG.float() - _SCALE_BIAS).to(torch.bfloat16)[..., None]
        torch.mul(numbers_OGB, scale_OG1, out=out_OI.view(outputs, groups, MX_BLOCK))
    return out_EOI


def fp8(weight: Tensor, scale: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """E4M3 times its block's scale, in float32, rounded once."""
    wide = scale.float().repeat_interleave(block[0], -2)[..., : weight.shape[-2], :]
    wide = wide.repeat_interleave(block[1], -1)[..., : weight.shape[-1]]
    return (weight.float() * wide).to(dtype)
