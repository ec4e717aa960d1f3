"""Writes bitsandbytes.golden, in safetensors' form: tensors that the library packed, and what it unpacks of them.

In an environment that has bitsandbytes (0.50.2 wrote it, on a CPU):
`python -m tests.engine.models.bitsandbytes_golden`.
"""

import importlib
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

FILE: Final = Path(__file__).with_name("bitsandbytes.golden")
# Kind, whether the scales are packed too, dtype, shape, numbers that share a scale.
CASES: Final = {
    "nf4 nested bfloat16": ("nf4", True, torch.bfloat16, (40, 64), 64),
    "nf4 nested float16 cut": ("nf4", True, torch.float16, (301, 61), 64),
    "nf4 float32": ("nf4", False, torch.float32, (5, 60), 128),
    "fp4 nested float32": ("fp4", True, torch.float32, (16, 24), 64),
}


def write() -> None:
    functional = importlib.import_module("bitsandbytes.functional")
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, (kind, nested, dtype, shape, block)) in enumerate(CASES.items()):
        weight = (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(number))).to(dtype)
        packed, state = functional.quantize_4bit(weight, blocksize=block, compress_statistics=nested, quant_type=kind)
        tensors |= {f"{name}.weight.{part}": each for part, each in state.as_dict(packed=True).items()}
        tensors[f"{name}.weight"] = packed
        tensors[f"{name}.expected"] = functional.dequantize_4bit(packed, state)
    save_file(tensors, FILE)


if __name__ == "__main__":
    write()
