"""Weights that files have in few bits: which tensors make one, and the shape that it has once it is unpacked.

Formats, by `quant_method` of config.json's quantization_config: `mxfp4`, blocks of 32 numbers in four bits with a power
of two each (OCP Microscaling Formats 1.0, section 5.3, as gpt-oss ships); `fp8`, E4M3 with a scale for each block of a
matrix (arXiv 2412.19437, section 3.3.2, as DeepSeek-V3 ships); `bitsandbytes`, four bits with a scale for each block
of numbers in a row, the scales in eight bits themselves or not (QLoRA, arXiv 2305.14314, section 3);
`compressed-tensors`, whole numbers of four bits with a scale for each group of a matrix's row (as Kimi K2 Thinking
ships). Which tensors are packed so is read off the files. Loads no torch.
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

Method = Literal["mxfp4", "fp8", "bitsandbytes", "compressed-tensors"]
METHODS: Final[tuple[Method, ...]] = ("mxfp4", "fp8", "bitsandbytes", "compressed-tensors")
MX_BLOCK: Final = 32  # numbers that share a scale
BNB_BLOCKS: Final = (64, 32, 128, 256, 512, 1024, 2048, 4096)  # numbers that share a scale, as the library has them
BNB_NESTED_BLOCK: Final = 256  # scales that share one
BNB_KINDS: Final = ("nf4", "fp4")
_STATE: Final = ".quant_state.bitsandbytes__"
_STATE_LARGEST: Final = 4096  # far more than its few sizes take
_INT4: Final = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
_IN_ORDER: Final = (None, False, "static", "weight")  # groups are of neighbours
_WORD: Final = 8  # numbers of four bits in one of 32
_FIELD: Final = "quantization_config"


@dataclass(frozen=True)
class Packing:
    """How a model's files pack weights. `block`: (rows, columns) of a matrix that share a scale, of fp8 and
    compressed-tensors.
    """

    method: Method
    block: tuple[int, int] = (1, 1)

    @classmethod
    def read(cls, raw: Raw, path: Path) -> "Packing | None":
        """None of a model whose weights are plain. Raises UserError for a block that is none."""
        if raw.get(_FIELD) is None:
            return None
        found: Mapping[str, Any] = raw[_FIELD]
        if found["quant_method"] in ("mxfp4", "bitsandbytes"):
            return cls(found["quant_method"])
        if found["quant_method"] == "compressed-tensors":
            return cls("compressed-tensors", (1, _group_size(found)))
        block = found.get("weight_block_size")
        whole = isinstance(block, list) and len(block) == 2 and all(type(one) is int and one > 0 for one in block)
        if not isinstance(block, list) or not whole:
            raise UserError(f"{path}: weight_block_size is {block!r}; supported in fp8: two sizes, [128, 128]")
        return cls("fp8", (block[0], block[1]))


def refusal(raw: Raw) -> str:
    """Why the weights of this config.json are not read; empty if they are plain, or packed as is known here."""
    found = raw.get(_FIELD)
    method = found.get("quant_method") if isinstance(found, Mapping) else found
    if isinstance(found, Mapping) and method == "bitsandbytes" and not found.get("load_in_4bit"):
        return f"quantized weights of bitsandbytes ({_FIELD} has no load_in_4bit; read are four bits, nf4 or fp4)"
    if isinstance(found, Mapping) and method == "compressed-tensors" and not _group_size(found):
        return (
            f"quantized weights of compressed-tensors, of another kind ({_FIELD} has format {found.get('format')!r}; "
            "read are pack-quantized whole numbers of four bits, symmetric, in groups of one size, plain activations)"
        )
    if found is None or method in METHODS:
        return ""
    return f"quantized weights ({_FIELD} has quant_method {method!r}; read are {', '.join(METHODS)})"


def _group_size(found: Mapping[str, Any]) -> int:
    """Of compressed-tensors: numbers of a row that share a scale; 0 for weights that are not read."""
    groups = found.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    sizes: set[object] = set()
    for scheme in schemes:
        weights = scheme.get("weights") if isinstance(scheme, Mapping) else None
        if not isinstance(weights, Mapping) or scheme.get("input_activations") or scheme.get("output_activations"):
            return 0
        kind = {name: weights.get(name) for name in _INT4}
        sizes.add(weights.get("group_size") if kind == _INT4 and weights.get("actorder") in _IN_ORDER else 0)
    size = next(iter(sizes), 0)
    read = found.get("format") == "pack-quantized" and len(sizes) == 1 and type(size) is int and size > 0
    return size if read and isinstance(size, int) else 0


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
    parts = _parts(name, shape, headers, packing)
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


def _parts(name: str, shape: Shape, headers: Mapping[str, TensorHeader], packing: Packing) -> _Parts:
    match packing.method:
        case "mxfp4":
            return _mx_parts(shape)
        case "fp8":
            return _fp8_parts(shape, packing.block)
        case "bitsandbytes":
            return _bnb_parts(name, shape, headers)
        case "compressed-tensors":
            return _int4_parts(shape, packing.block[1])


def _mx_parts(shape: Shape) -> _Parts:
    """Of (experts, inputs, outputs), which the files have by output: two numbers a byte, and a scale for 32."""
    experts, inputs, outputs = shape
    blocks = experts, outputs, inputs // MX_BLOCK
    return {"_blocks": ((*blocks, MX_BLOCK // 2), ("uint8",)), "_scales": (blocks, ("uint8",))}


def _fp8_parts(shape: Shape, block: tuple[int, int]) -> _Parts:
    grid = *shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1])
    return {"": (shape, ("float8_e4m3fn",)), "_scale_inv": (grid, ("float32", "bfloat16"))}


def _bnb_parts(name: str, shape: Shape, headers: Mapping[str, TensorHeader]) -> _Parts:
    """Two numbers a byte, a scale for each block of them, and what the codes mean. The sizes of blocks, which are in a
    tensor of JSON too, are told by the counts of scales.
    """
    numbers = math.prod(shape)
    kind = next((kind for kind in BNB_KINDS if f"{name}{_STATE}{kind}" in headers), BNB_KINDS[0])
    stated = headers.get(f"{name}{_STATE}{kind}")
    whole = stated is not None and len(stated.shape) == 1 and stated.shape[0] <= _STATE_LARGEST
    scales = headers.get(f"{name}.absmax")
    counts = [(-(-numbers // block),) for block in BNB_BLOCKS]
    count = scales.shape if scales is not None and scales.shape in counts else counts[0]
    parts: _Parts = {
        "": ((-(-numbers // 2), 1), ("uint8",)),
        ".absmax": (count, ("float32",)),
        ".quant_map": ((16,), ("float32",)),
        f"{_STATE}{kind}": (stated.shape if stated is not None and whole else (_STATE_LARGEST,), ("uint8",)),
    }
    if f"{name}.nested_absmax" in headers:
        parts[".absmax"] = (count, ("uint8",))
        parts[".nested_absmax"] = ((-(-count[0] // BNB_NESTED_BLOCK),), ("float32",))
        parts[".nested_quant_map"] = ((256,), ("float32",))
    return parts


def _int4_parts(shape: Shape, group: int) -> _Parts:
    words, groups = (-(-shape[-1] // each) for each in (_WORD, group))
    return {
        "_packed": ((*shape[:-1], words), ("int32",)),
        "_scale": ((*shape[:-1], groups), ("bfloat16", "float16", "float32")),
        "_shape": ((len(shape),), ("int64", "int32")),
    }
