"""Weights that files have in few bits: which tensors make one, and the shape that it has once it is unpacked.

Formats, by `quant_method` of config.json's quantization_config: `mxfp4`, blocks of 32 numbers in four bits with a power
of two each (OCP Microscaling Formats 1.0, section 5.3, as gpt-oss ships); `fp8`, E4M3 with a scale for each block of a
matrix (arXiv 2412.19437, section 3.3.2, as DeepSeek-V3 ships). Which tensors are packed so is read off the files. Loads
no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from knapper.engine.models.fields import Raw
from knapper.engine.models.linear_shape import Shape
from knapper.engine.models.tensor_header import BrokenModel, TensorHeader
from knapper.errors import UserError

Method = Literal["mxfp4", "fp8"]
METHODS: Final[tuple[Method, ...]] = ("mxfp4", "fp8")
MX_BLOCK: Final = 32  # numbers that share a scale
_FIELD: Final = "quantization_config"


@dataclass(frozen=True)
class Packing:
    """How a model's files pack weights. `block`: (rows, columns) of a matrix that share a scale, of fp8."""

    method: Method
    block: tuple[int, int] = (1, 1)

    @classmethod
    def read(cls, raw: Raw, path: Path) -> "Packing | None":
        """None of a model whose weights are plain. Raises UserError for a block that is none."""
        if raw.get(_FIELD) is None:
            return None
        found: Mapping[str, Any] = raw[_FIELD]
        if found["quant_method"] == "mxfp4":
            return cls("mxfp4")
        block = found.get("weight_block_size")
        whole = isinstance(block, list) and len(block) == 2 and all(type(one) is int and one > 0 for one in block)
        if not isinstance(block, list) or not whole:
            raise UserError(f"{path}: weight_block_size is {block!r}; supported in fp8: two sizes, [128, 128]")
        return cls("fp8", (block[0], block[1]))


def refusal(raw: Raw) -> str:
    """Why the weights of this config.json are not read; empty if they are plain, or packed as is known here."""
    found = raw.get(_FIELD)
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if found is None or method in METHODS:
        return ""
    return f"quantized weights ({_FIELD} has quant_method {method!r}; read are {', '.join(METHODS)})"


@dataclass(frozen=True)
class PackedTensor:
    """A tensor of the model of `shape`, and the tensors of its file that it is made of, by what follows its name."""

    packing: Packing
    shape: Shape
    parts: Mapping[str, TensorHeader]

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


def packed_of(
    name: str, shape: Shape, headers: Mapping[str, TensorHeader], packing: Packing | None
) -> PackedTensor | None:
    """The tensor `name` of `shape`, if the files have it packed. Raises BrokenModel for parts of another shape."""
    if packing is None or len(shape) < 2 or (packing.method == "mxfp4" and (len(shape) != 3 or shape[1] % MX_BLOCK)):
        return None
    parts = _mx_parts(shape) if packing.method == "mxfp4" else _fp8_parts(shape, packing.block)
    if not all(f"{name}{end}" in headers for end in parts):
        return None
    found = {end: headers[f"{name}{end}"] for end in parts}
    for end, (expected, dtypes) in parts.items():
        header = found[end]
        if header.shape != expected or header.dtype not in dtypes:
            raise BrokenModel(
                f"{header.path}: tensor {header.stored} is {header.dtype} {list(header.shape)}; config.json makes it "
                f"{' or '.join(dtypes)} {list(expected)}"
            )
    return PackedTensor(packing, shape, found)


_Parts = dict[str, tuple[Shape, tuple[str, ...]]]  # by the end of its name, a part's shape and allowed dtypes


def _mx_parts(shape: Shape) -> _Parts:
    """Of (experts, inputs, outputs), which the files have by output: two numbers a byte, and a scale for 32."""
    experts, inputs, outputs = shape
    blocks = experts, outputs, inputs // MX_BLOCK
    return {"_blocks": ((*blocks, MX_BLOCK // 2), ("uint8",)), "_scales": (blocks, ("uint8",))}


def _fp8_parts(shape: Shape, block: tuple[int, int]) -> _Parts:
    grid = *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    return {"": (shape, ("float8_e4m3fn",)), "_scale_inv": (grid, ("float32", "bfloat16"))}
