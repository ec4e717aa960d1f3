"""Checkpoints whose weights are in few bits, as published ones are: a tiny model's, packed here by random numbers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.strange import strange_model

Tensors = dict[str, Tensor]


def mxfp4_model(directory: Path) -> Path:
    """gpt-oss, its experts in four bits."""
    strange_model(directory, "gpt_oss", intermediate_size=64)
    tensors, draw = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = experts, outputs, inputs // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), generator=draw, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(122, 126, blocks, generator=draw, dtype=torch.uint8)
    _write(directory, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return directory


def fp8_model(directory: Path, kind: str = "qwen3_moe") -> Path:
    """Every linear but routers and the head in fp8, a scale for blocks of 16 rows and 16 columns."""
    strange_model(directory, kind)
    tensors = load_file(directory / "model.safetensors")
    block = 16, 16
    for name in [name for name in tensors if ".layers." in name and tensors[name].dim() == 2]:
        if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight")):
            continue
        weight = tensors[name]
        rows, columns = (-(-size // one) for size, one in zip(weight.shape, block, strict=True))
        scale = torch.stack(
            [strip.abs().amax() for part in weight.split(block[0]) for strip in part.split(block[1], 1)]
        )
        scale = scale.view(rows, columns) / 448
        wide = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: len(weight), : weight.shape[1]]
        tensors[name] = (weight / wide).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    _write(directory, tensors, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)})
    return directory


def bitsandbytes_model(directory: Path, kind: str = "qwen3_yarn", block: int = 64) -> Path:
    """Every linear of a layer in nf4, its scales packed too."""
    strange_model(directory, kind)
    tensors, draw = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if ".layers." in name and tensors[name].dim() == 2]:
        shape = tensors[name].shape
        scales = -(-shape.numel() // block)
        state = {
            "quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape), "nested_blocksize": 256,
            "nested_dtype": "float32", "nested_offset": 0.2,
        }  # fmt: skip
        tensors[name] = torch.randint(0, 256, (shape.numel() // 2, 1), generator=draw, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.randint(0, 256, (scales,), generator=draw, dtype=torch.uint8)
        tensors[f"{name}.quant_map"] = torch.linspace(-1, 1, 16)
        tensors[f"{name}.nested_absmax"] = torch.rand(-(-scales // 256), generator=draw) * 0.1
        tensors[f"{name}.nested_quant_map"] = torch.linspace(-1, 1, 256)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
    _write(directory, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"})
    return directory


def int4_model(directory: Path, kind: str = "deepseek_v3", group: int = 16) -> Path:
    """Experts in whole numbers of four bits, as Kimi K2 Thinking has them."""
    strange_model(directory, kind)
    tensors, draw = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if ".experts." in name]:
        outputs, inputs = tensors.pop(name).shape
        words = outputs, -(-inputs // 8)
        tensors[f"{name}_packed"] = torch.randint(-(2**31), 2**31, words, generator=draw).int()
        tensors[f"{name}_scale"] = (0.05 * torch.rand(outputs, -(-inputs // group), generator=draw)).bfloat16()
        tensors[f"{name}_shape"] = torch.tensor([outputs, inputs])
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    _write(directory, tensors, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme},
    })  # fmt: skip
    return directory


def _write(directory: Path, tensors: Tensors, quantization: dict[str, Any]) -> None:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
