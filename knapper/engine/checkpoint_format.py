"""A run as files: the PEFT directory that a user downloads, the optimizer state, and the raw snapshot.

P parameters of an adapter. A safetensors file is a JSON header and one block of bytes. The arena is that block as it
is, so that a save writes a header and copies no single tensor.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from knapper.engine.layers.lora import Layout
from knapper.engine.models.config import LoraTarget
from knapper.engine.training.optimizer import Moments, is_finite
from knapper.engine.training.trainer import RunState
from knapper.errors import Corrupt, InvalidField, UserError
from knapper.state.journal.machine import Files
from knapper.state.journal.records import Spec
from knapper.wire.untrusted import parsing

_OUTER = ("down_proj",)  # of two parameters of a block PEFT wraps the second around the first

CONFIG, ADAPTER, OPTIMIZER = "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"

UNTIE_FIRST = (
    "no: the adapted lm_head is the embedding, into which a merge would go too. Load the model with "
    "tie_word_embeddings=False and lm_head.weight a copy of the embedding first"
)


def peft_names(module: str) -> tuple[str, str]:
    """PEFT's names of A and B of a module."""
    return f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight"


def peft_sides(target: LoraTarget) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """PEFT's names of all A and of all B of a target module: of experts one each, unless they are one parameter."""
    if target.whole:
        block, _, parameter = target.module.rpartition(".")
        of_a, of_b = peft_names(block if parameter in _OUTER else f"{block}.base_layer")
        return (of_a,), (of_b,)
    a, b = zip(*map(peft_names, target.modules), strict=True)
    return a, b


def export(state: RunState, *, with_optimizer: bool) -> Files:
    """A PEFT directory that PEFT, transformers and vLLM load unchanged; with the optimizer, training can resume from
    it.

    Every number is kept bit for bit, pending gradients are left out. The safetensors metadata `merges` says whether
    `merge_and_unload` gives the same model.
    """
    names: list[tuple[str, tuple[int, ...]]] = []
    for target in state.layout.lora_targets:
        for name, shape in zip(peft_sides(target), _filed_shapes(target, state.layout.rank), strict=True):
            names += [(each, shape) for each in name]
    files = {
        CONFIG: json.dumps(_config(state.spec, state.layout), indent=2).encode() + b"\n",
        ADAPTER: _safetensors(names, [_filed(state)], {"merges": "yes" if state.layout.merges else UNTIE_FIRST}),
    }
    if with_optimizer:
        size = (state.layout.numel,)
        moments = state.moments
        files[OPTIMIZER] = _safetensors(
            [("exp_avg", size), ("exp_avg_sq", size)], [moments.m_P, moments.v_P], {"step": str(moments.step)}
        )
    return files


def read(files: Files, spec: Spec, layout: Layout, *, with_optimizer: bool) -> tuple[Tensor, Moments | None]:
    """The content of an `export`, bit for bit, for a run of the same base model, rank, alpha and targets.

    Raises InvalidField for a checkpoint of another form, UserError for non-finite numbers, Corrupt for broken files.
    """
    _check_config(_json(_file(files, CONFIG), CONFIG), _config(spec, layout))
    tensors, _ = _tensors(_file(files, ADAPTER), ADAPTER)
    weights_P = torch.empty(layout.numel)
    for target, *parts in layout.matrices(weights_P):
        for names, part, shape in zip(peft_sides(target), parts, _filed_shapes(target, layout.rank), strict=True):
            for name, matrix in zip(names, part.view(len(names), *shape), strict=True):
                matrix.copy_(_take(tensors, name, shape, ADAPTER))
        if target.whole:
            experts, outputs, rank = parts[1].shape
            parts[1].copy_(parts[1].view(outputs, rank, experts).permute(2, 0, 1).clone())
    if tensors:
        raise Corrupt(f"{ADAPTER} has tensors that its configuration does not: {', '.join(sorted(tensors)[:4])}")
    moments: Moments | None = None
    if with_optimizer:
        if OPTIMIZER not in files:
            raise InvalidField(
                "path",
                "a checkpoint without optimizer state",
                "one written by save_state",
                "Or load it without optimizer",
            )
        tensors, metadata = _tensors(files[OPTIMIZER], OPTIMIZER)
        m_P, v_P = (_take(tensors, name, (layout.numel,), OPTIMIZER) for name in ("exp_avg", "exp_avg_sq"))
        if not metadata.get("step", "").isdecimal():
            raise Corrupt(f"{OPTIMIZER} has no step count")
        moments = Moments(m_P, v_P, int(metadata["step"]))
    for kind, arena_P in (
        ("weights", weights_P),
        *([("moments", moments.m_P), ("moments", moments.v_P)] if moments else []),
    ):
        if not is_finite(arena_P):
            raise UserError(f"the checkpoint's {kind} have NaN or infinite numbers; load another checkpoint")
    return weights_P, moments


def _filed_shapes(target: LoraTarget, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of A and B in the file: of experts one each, unless they are one parameter, of which PEFT has all in one."""
    experts = (target.experts or 1) if target.whole else 1
    return (experts * rank, target.inputs), (target.outputs, rank * experts)


def _filed(state: RunState) -> Tensor:
    """The arena as the file has it: B of experts that are one parameter is (outputs, R, experts) there."""
    if not any(target.whole for target in state.layout.lora_targets):
        return state.weights_P
    filed_P = state.weights_P.clone()
    for target, _, b in state.layout.matrices(filed_P):
        if target.whole:
            b.view(-1).copy_(b.permute(1, 2, 0).flatten())
    return filed_P


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of a snapshot. `numel` guards against a layout that changed between versions."""

    v: int
    step: int
    numel: int
    pending: bool


def freeze(state: RunState) -> Files:
    """The whole state as raw little-endian float32 arenas and a header; on the CPU they share the state's memory."""
    header = _Header(1, state.moments.step, state.layout.numel, state.grads_P is not None)
    files: dict[str, bytes | memoryview] = {
        "header.json": msgspec.json.encode(header),
        "weights.f32": _raw(state.weights_P),
        "m.f32": _raw(state.moments.m_P),
        "v.f32": _raw(state.moments.v_P),
    }
    if state.grads_P is not None:
        files["grads.f32"] = _raw(state.grads_P)
    return files


def frozen_bytes(state: RunState) -> int:
    """Bytes of the files of `freeze`, without the header."""
    return 4 * state.layout.numel * (3 + (state.grads_P is not None))


def thaw(files: Files, layout: Layout) -> tuple[Tensor, Moments, Tensor | None]:
    """(weights, moments, pending gradients) of a `freeze`, bit for bit. Raises Corrupt."""
    with parsing(lambda error: Corrupt(f"the snapshot's header.json cannot be read: {error}")):
        header = msgspec.json.decode(bytes(_file(files, "header.json")), type=_Header)
    if header.v != 1 or header.numel != layout.numel:
        raise Corrupt(
            f"the snapshot has format {header.v} and {header.numel} parameters; "
            f"this run needs format 1 and {layout.numel}"
        )
    weights_P, m_P, v_P = (_arena(_file(files, name), name, layout) for name in ("weights.f32", "m.f32", "v.f32"))
    grads_P = _arena(_file(files, "grads.f32"), "grads.f32", layout) if header.pending else None
    return weights_P, Moments(m_P, v_P, header.step), grads_P


def _config(spec: Spec, layout: Layout) -> dict[str, Any]:
    targets = layout.lora_targets
    parameters = list(dict.fromkeys(each.peft_parameter for each in targets if each.peft_parameter))
    # Of gate and up in one tensor PEFT has one pair, of twice the rank, into which it joins the file's.
    pairs = {each.peft_parameter: set[str]() for each in targets if each.peft_parameter and each.experts}
    for each in targets:
        if each.peft_parameter in pairs:
            pairs[each.peft_parameter].add(each.module.rpartition(".")[2])
    fused = {rf".*\.{name.rpartition('.')[2]}": len(found) for name, found in pairs.items() if len(found) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": spec.base_model,
        "r": spec.rank,
        "lora_alpha": _whole(spec.alpha),
        "lora_dropout": 0.0,
        "target_modules": list(dict.fromkeys(target.peft_target for target in targets if not target.peft_parameter)),
        **({"target_parameters": parameters} if parameters else {}),
        **({"rank_pattern": {name: count * spec.rank for name, count in fused.items()}} if fused else {}),
        **({"alpha_pattern": {name: _whole(count * spec.alpha) for name, count in fused.items()}} if fused else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _whole(alpha: float) -> float:
    """vLLM wants a whole number."""
    return int(alpha) if alpha.is_integer() else alpha


def _check_config(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares the fields that give the numbers their meaning."""
    for field in ("base_model_name_or_path", "r", "lora_alpha", "target_modules"):
        if field not in stored:
            raise Corrupt(f"{CONFIG} has no {field}")
        if stored[field] != expected[field]:
            raise InvalidField(
                f"the checkpoint's {field}", stored[field], f"{expected[field]!r}, which this run has",
                "Create a new run from the checkpoint (create_training_client_from_state)",
            )  # fmt: skip


def _safetensors(
    names: Sequence[tuple[str, tuple[int, ...]]], arenas: Sequence[Tensor], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A safetensors file of float32 tensors that lie one after another in the arenas."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    start = 0
    for name, shape in names:
        end = start + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
        start = end
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    return b"".join([struct.pack("<Q", len(header_bytes)), header_bytes, *map(_raw, arenas)])


def _tensors(data: bytes | memoryview, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    data = bytes(data)
    with parsing(lambda error: Corrupt(f"{name} cannot be read as safetensors: {error}")):
        tensors = load(data)
        (size,) = struct.unpack_from("<Q", data)
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return tensors, metadata


def _take(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], file: str) -> Tensor:
    tensor = tensors.pop(name, None)
    if tensor is None or tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        problem = "is missing" if tensor is None else f"is {tensor.dtype} {tuple(tensor.shape)}"
        raise Corrupt(f"tensor {name} of {file} {problem}; expected float32 {shape}")
    return tensor


def _file(files: Files, name: str) -> bytes | memoryview:
    if name not in files:
        raise Corrupt(f"file {name} is missing; there are: {', '.join(sorted(files)) or 'none'}")
    return files[name]


def _json(data: bytes | memoryview, name: str) -> dict[str, Any]:
    with parsing(lambda error: Corrupt(f"{name} is not JSON: {error}")):
        value = json.loads(bytes(data))
    if not isinstance(value, dict):
        raise Corrupt(f"{name} holds {type(value).__name__}; expected an object")
    return value


def _raw(arena_P: Tensor) -> memoryview:
    array: np.ndarray = arena_P.detach().cpu().numpy().astype("<f4", copy=False)
    return array.data.cast("B")


def _arena(data: bytes | memoryview, name: str, layout: Layout) -> Tensor:
    if len(data) != 4 * layout.numel:
        raise Corrupt(f"{name} of the snapshot has {len(data)} bytes; expected {4 * layout.numel}")
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))  # a copy: tensors must own memory
