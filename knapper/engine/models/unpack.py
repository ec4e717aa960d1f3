"""Packed weights as plain ones: what `packed` describes, in the dtype that computes. One tensor at a time.

E experts, O outputs, I inputs, G blocks of a row, N numbers of a tensor.
"""

from collections.abc import Callable
from typing import Final, Literal

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine.models.packed import BNB_BLOCKS, BNB_NESTED_BLOCK, MX_BLOCK, PackedTensor
from knapper.engine.models.tensor_header import BrokenModel

Take = Callable[[str], Tensor]  # a part, by the end of its name

_FP4: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1
_SCALE_BIAS: Final = 127  # of E8M0


def unpacked(tensor: PackedTensor, take: Take, dtype: torch.dtype) -> Tensor:
    """Of `tensor.shape`. fp8 is rounded once to `dtype`; four bits and a power of two fit bfloat16 exactly, and stay
    in it.
    """
    if tensor.packing.method == "mxfp4":
        return mxfp4(take("_blocks"), take("_scales")).transpose(1, 2)
    if tensor.packing.method == "bitsandbytes":
        return bitsandbytes(tensor, take).to(dtype)
    if tensor.packing.method == "compressed-tensors":
        return int4(tensor, take).to(dtype)
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


class _BnbState(msgspec.Struct):
    """What a tensor of JSON says of a packed one. `dtype`: in which bitsandbytes computes it."""

    blocksize: int
    dtype: Literal["bfloat16", "float16", "float32"]
    shape: list[int]
    nested_blocksize: int = BNB_NESTED_BLOCK
    nested_offset: float = 0.0


def bitsandbytes(tensor: PackedTensor, take: Take) -> Tensor:
    """Of `tensor.shape`, in the dtype that the file names, to which the library itself rounds: a code times the scale
    of its block. The high half of a byte comes first. Where scales are packed too, each is a code times the scale of
    its own block, and all are moved by one number.

    Sources: QLoRA, arXiv 2305.14314, section 3; bitsandbytes' `functional.QuantState` and its default kernels. Raises
    BrokenModel if the file says otherwise than its tensors.
    """
    (end,) = (end for end in tensor.parts if "quant_state" in end)
    header, scales_G = tensor.parts[end], take(".absmax")
    try:
        state = msgspec.json.decode(bytes(take(end).cpu().numpy()), type=_BnbState)
    except msgspec.MsgspecError as error:
        raise BrokenModel(f"{header.path}: tensor {header.stored} is not what bitsandbytes writes: {error}") from error
    numbers = tensor.numbers
    sized = state.blocksize in BNB_BLOCKS and -(-numbers // state.blocksize) == len(scales_G)
    if tuple(state.shape) != tensor.shape or not sized or state.nested_blocksize != BNB_NESTED_BLOCK:
        raise BrokenModel(
            f"{header.path}: tensor {header.stored} says shape {state.shape}, blocks of {state.blocksize} and "
            f"{state.nested_blocksize}; config.json and {len(scales_G)} scales make it {list(tensor.shape)}, blocks of "
            f"{numbers / max(1, len(scales_G)):g} and {BNB_NESTED_BLOCK}"
        )
    if ".nested_absmax" in tensor.parts:
        wide_G = take(".nested_absmax").repeat_interleave(BNB_NESTED_BLOCK)[: len(scales_G)]
        scales_G = take(".nested_quant_map")[scales_G.int()] * wide_G + state.nested_offset
    codes, packed = take(".quant_map"), take("").flatten()
    halves = torch.stack([codes[torch.arange(256, device=codes.device) >> 4], codes.repeat(16)], dim=1)
    numbers_N = F.embedding(packed.int(), halves).flatten()[:numbers]
    scales_N = scales_G.repeat_interleave(state.blocksize)[:numbers]
    return numbers_N.mul_(scales_N).view(tensor.shape).to(getattr(torch, state.dtype))


def int4(tensor: PackedTensor, take: Take) -> Tensor:
    """Of `tensor.shape`, in the dtype of its scales, to which compressed-tensors rounds: whole numbers from -8 to 7,
    eight in a word, the lowest bits first, times the scale of their group.

    Source: compressed-tensors' `pack_quantized`. Raises BrokenModel if the file says another shape.
    """
    packed, scales_OG = take("_packed"), take("_scale")
    if (said := tuple(take("_shape").tolist())) != tensor.shape:
        header = tensor.parts["_shape"]
        raise BrokenModel(
            f"{header.path}: tensor {header.stored} says {list(said)}; config.json makes it {list(tensor.shape)}"
        )
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    inputs = tensor.shape[-1]
    numbers = ((packed[..., None] >> shifts) & 15).flatten(-2)[..., :inputs] - 8
    wide = scales_OG.float().repeat_interleave(tensor.packing.block[1], -1)[..., :inputs]
    return (numbers.float() * wide).to(scales_OG.dtype)
