"""The weight files of a model directory, checked by their headers against config.json.

Loads no torch: the start of a server fails within milliseconds if an engine could not read them.
"""

import json
import re
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from safetensors import SafetensorError, safe_open

from knapper.engine.models.composite import text_name, usual_name, vision_name
from knapper.engine.models.config import ModelConfig, is_composite, serves_images
from knapper.engine.models.fields import UnsupportedModel
from knapper.engine.models.linear_shape import Shape
from knapper.engine.models.packed import PackedTensor, packed_of
from knapper.engine.models.tensor_header import BrokenModel, TensorHeader
from knapper.errors import NotFound, UserError

ALLOWED: Final = ("bfloat16", "float16", "float32", "float64")  # dtypes of stored base weights
DTYPES: Final = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
_HEADER_BYTES_MAX: Final = 100_000_000  # the format's own limit
_LFS: Final = b"version https://git-lfs"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def paths(directory: Path) -> list[Path]:
    """The weight files: one, or the shards of an index. Raises NotFound, BrokenModel."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise NotFound(f"{directory} has neither model.safetensors nor model.safetensors.index.json")
    # Without directories: a path could leave the model's.
    shards = [directory / name for name in sorted({Path(name).name for name in _weight_map(index).values()})]
    missing = [path.name for path in shards if not path.is_file()]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise BrokenModel(f"{directory}: shards named by the index are missing: {shown}. Download the model again")
    return shards


def entries(directory: Path) -> dict[str, TensorHeader]:
    """Every tensor by name, from the headers of complete files. Raises NotFound, BrokenModel."""
    headers: dict[str, TensorHeader] = {}
    for path in paths(directory):
        with opened(path, "numpy") as file:
            for name in names(file):
                tensor = file.get_slice(name)
                dtype = tensor.get_dtype()
                headers[name] = TensorHeader(path, name, tuple(tensor.get_shape()), DTYPES.get(dtype, dtype))
    index = directory / "model.safetensors.index.json"
    if not (directory / "model.safetensors").is_file():
        for name, shard in _weight_map(index).items():
            if name not in headers:
                raise BrokenModel(f"{directory}: tensor {name} is missing; the index promises it in {shard}")
    return headers


def text_entries(directory: Path) -> dict[str, TensorHeader]:
    """The language model's tensors, by the names of a model of text alone, and by the usual ones where a family has its
    own. Raises NotFound, BrokenModel.

    Of a composite's other parts none is among them: they are neither read nor counted.
    """
    headers, plain = entries(directory), text_name if is_composite(directory) else usual_name
    found: dict[str, TensorHeader] = {}
    for stored, header in headers.items():
        name = plain(stored)
        if name in found:
            raise BrokenModel(f"{directory}: {stored} and {found[name].stored} are the same tensor. Keep one of them")
        if name is not None:
            found[name] = header
    return found


def vision_entries(directory: Path) -> dict[str, TensorHeader]:
    """The tensors of the vision tower, by their names in it; empty where images are not served. Raises as `entries`."""
    if not serves_images(directory):
        return {}
    named = ((vision_name(stored), header) for stored, header in entries(directory).items())
    return {name: header for name, header in named if name is not None}


def skipped_bytes(directory: Path) -> int:
    """Bytes of the tensors that are not read. Raises NotFound, BrokenModel."""
    if not is_composite(directory):
        return 0
    of_images = sum(header.nbytes for header in vision_entries(directory).values())
    beside = sum(header.nbytes for stored, header in entries(directory).items() if text_name(stored) is None)
    return beside - of_images


def read_spans(path: Path) -> list[tuple[int, int]]:
    """Where the file has what the engine reads: bytes from, to. The whole file, where its header is not read.

    Neighbours are one span, so that of a model of text alone they are the file.
    """
    whole = [(0, path.stat().st_size)]
    try:
        if not is_composite(path.parent):
            return whole
        start, header = _header(path)
        seen = vision_name if serves_images(path.parent) else text_name
        places = sorted(
            tensor["data_offsets"]
            for name, tensor in header.items()
            if text_name(name) is not None or seen(name) is not None
        )
    except (UserError, OSError, ValueError, TypeError, LookupError, AttributeError):
        return whole  # the loader says what is wrong with it
    spans: list[tuple[int, int]] = []
    for begin, end in places:
        joined = bool(spans) and spans[-1][1] == start + begin
        first = spans.pop()[0] if joined else start + begin
        spans.append((first, start + end))
    return spans


def promised(config: ModelConfig, having: Container[str] = ()) -> Iterator[tuple[str, Shape]]:
    """Name and shape of every tensor of a native model.

    Experts of a layer are one by one, unless the files are `having` the first of the tensors that join them.
    """
    yield "model.embed_tokens.weight", (config.vocab_size, config.hidden)
    yield f"{config.final_norm}.weight", (config.hidden,)
    for index, layer in enumerate(config.layers):
        prefix = f"model.layers.{index}"
        yield from ((f"{prefix}.{name}.weight", (width,)) for name, width in layer.norm_widths(config.hidden).items())
        yield from ((f"{prefix}.{name}", shape) for name, shape in layer.tensors(config.hidden).items())
        joined = {f"{prefix}.{name}": shape for name, shape in layer.joined(config.hidden).items()}
        joins = any(linear.whole for linear in layer.linears(config.hidden)) or next(iter(joined), None) in having
        if joins:
            yield from joined.items()
        for linear in layer.stored(config.hidden):
            if joins and linear.joined is not None:
                continue
            for module in linear.modules:
                yield f"{prefix}.{module}.weight", (linear.outputs, linear.inputs)
                if linear.biased:
                    yield f"{prefix}.{module}.bias", (linear.outputs,)
    if not config.tied:
        yield "lm_head.weight", (config.vocab_size, config.hidden)


def is_unread(name: str, config: ModelConfig) -> bool:
    """Whether it is of a part of a layer that no text needs that is served."""
    layer = re.match(r"model\.layers\.\d+\.", name)
    return layer is not None and name[layer.end() :].startswith(config.unread)


def expect_promised(directory: Path, config: ModelConfig) -> dict[str, TensorHeader | PackedTensor]:
    """The promised tensors. Raises NotFound, BrokenModel for one that is missing, unexpected, or of another shape."""
    headers = text_entries(directory)
    found: dict[str, TensorHeader | PackedTensor] = {}
    known: set[str] = set()
    for name, shape in promised(config, headers):
        if (packed := packed_of(name, shape, headers, config.packing)) is not None:
            found[name] = packed
            known |= {f"{name}{end}" for end in packed.parts}
            continue
        if name not in headers:
            raise BrokenModel(f"{directory}: tensor {name} is missing; config.json promises it as {list(shape)}")
        header = headers[name]
        if header.shape != shape:
            raise BrokenModel(f"{directory}: tensor {name} is {list(header.shape)}; config.json makes it {list(shape)}")
        if header.dtype not in ALLOWED:
            raise BrokenModel(f"{directory}: tensor {name} is {header.dtype}; allowed: {', '.join(ALLOWED)}")
        found[name] = header
        known.add(name)
    optional = {"lm_head.weight"} if config.tied else set()
    behind = (f"model.layers.{len(config.layers) + extra}." for extra in range(config.extra_layers))
    skipped = ("mtp.", *behind)  # drafts of tokens ahead
    unexpected = sorted(
        name
        for name in headers.keys() - known - optional
        if not name.endswith("rotary_emb.inv_freq") and not name.startswith(skipped) and not is_unread(name, config)
    )
    if unexpected:
        shown = ", ".join(unexpected[:5]) + (", ..." if len(unexpected) > 5 else "")
        raise BrokenModel(f"{directory}: {len(unexpected)} tensors that the architecture does not have: {shown}")
    return found


def unpacked_bytes(directory: Path, number_bytes: int, *, kept_twice: bool) -> int:
    """Bytes of the weights that are read, in memory: `number_bytes` each, however few bits the files have of them.

    `kept_twice`: on a CPU what was unpacked stays beside the layout that computes, for gradients; plain weights are
    mapped there. Raises as `text_entries` and `expect_promised`.
    """
    try:
        found: Iterable[TensorHeader | PackedTensor] = expect_promised(directory, ModelConfig.read(directory)).values()
    except UnsupportedModel:
        found = text_entries(directory).values()
    found = [*found, *vision_entries(directory).values()]
    each = [(tensor.numbers, isinstance(tensor, PackedTensor)) for tensor in found]
    return sum(numbers * number_bytes * (2 if packed and kept_twice else 1) for numbers, packed in each)


def opened(path: Path, framework: str) -> safe_open:
    """The file, its header checked against its size. Raises BrokenModel, which names the defect."""
    try:
        path.open("rb").close()  # safetensors reports any file that it cannot open as missing
        return safe_open(path, framework=framework, device="cpu")
    except PermissionError as error:
        raise BrokenModel(f"{path} cannot be read: {error.strerror}; give this user the right to read it") from error
    except (SafetensorError, OSError) as error:
        raise BrokenModel(f"{path} cannot be read as safetensors: {_defect(path) or error}") from error


def names(file: safe_open) -> list[str]:
    return list(file.keys())  # type: ignore[no-untyped-call]  # the library has no types here


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except msgspec.MsgspecError as error:
        raise BrokenModel(f"{index} is not a safetensors index: {error}") from error


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """(where the tensors begin, their entries)."""
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), _HEADER_BYTES_MAX)
        header = json.loads(file.read(length))
    return 8 + length, {name: tensor for name, tensor in header.items() if name != "__metadata__"}


def _defect(path: Path) -> str:
    """Why a file is not valid safetensors; empty if unknown."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS))
            if start == _LFS:
                return "it is a pointer of Git LFS, and not the weights: run `git lfs pull` there"
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > _HEADER_BYTES_MAX:
                return f"it has {size} bytes and no header. Download it again"
            file.seek(8)
            header = file.read(length)
        if len(header) < length:
            return f"it was cut: it has {size} bytes, and its header alone {8 + length}. Download it again"
        ends = [int(tensor["data_offsets"][1]) for name, tensor in json.loads(header).items() if name != "__metadata__"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return ""
    promised_bytes = 8 + length + max(ends, default=0)
    if size < promised_bytes:
        return f"it was cut: it has {size} of the {promised_bytes} bytes that its header promises. Download it again"
    return (
        f"it has {size} bytes, and its header promises {promised_bytes}. Download it again"
        if size > promised_bytes
        else ""
    )
