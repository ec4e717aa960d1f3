"""Weights in four bits of bitsandbytes are those that the library unpacks; bitsandbytes.golden has some of its."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from knapper.catalogue import servable
from knapper.engine.models import unpack, weight_files
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.packed import PackedTensor, Packing, packed_of
from knapper.engine.models.tensor_header import BrokenModel, TensorHeader
from tests.engine.models.bitsandbytes_golden import CASES, FILE
from tests.engine.models.test_decoder import decoder_of, tokens_of
from tests.engine.models.test_packed import logits_of
from tests.engine.packed import bitsandbytes_model


def unpacked(named: dict[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Of a tensor's parts, by the ends of their names."""
    headers = {
        f"w{end}": TensorHeader(FILE, f"w{end}", tuple(part.shape), str(part.dtype).removeprefix("torch."))
        for end, part in named.items()
    }
    tensor = packed_of("w", shape, headers, Packing("bitsandbytes"))
    assert tensor is not None
    return unpack.bitsandbytes(tensor, named.__getitem__)


@pytest.mark.parametrize("case", CASES)
def test_unpacked_weights_have_the_librarys_bits(case: str) -> None:
    tensors, (_, nested, dtype, shape, _) = load_file(FILE), CASES[case]
    named = {name.removeprefix(f"{case}.weight"): each for name, each in tensors.items() if f"{case}.w" in name}
    assert (".nested_absmax" in named) == nested
    found = unpacked(named, shape)
    assert found.dtype == dtype
    assert torch.equal(found, tensors[f"{case}.expected"])


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_they_do_where_the_library_is_installed(kind: str) -> None:
    functional = importlib.import_module("bitsandbytes.functional")
    for seed in range(20):
        weight = torch.randn(70 + seed, 130, generator=torch.Generator().manual_seed(seed)).bfloat16()
        packed, state = functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=seed % 2 == 0, quant_type=kind
        )
        named = {"": packed} | {f".{part}": each for part, each in state.as_dict(packed=True).items()}
        assert torch.equal(unpacked(named, (70 + seed, 130)), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("block", [64, 128])
def test_a_packed_model_computes_what_its_plain_copy_does(tmp_path: Path, block: int) -> None:
    directory = bitsandbytes_model(tmp_path / "packed", block=block)
    assert servable.expect_config(directory) == "native"
    decoder = decoder_of(directory)
    tensors, config = load_file(directory / "model.safetensors"), ModelConfig.read(directory)
    found = weight_files.expect_promised(directory, config)
    packed = {name: each for name, each in found.items() if isinstance(each, PackedTensor)}
    assert len(packed) == 14, "two layers, of seven linears each"
    numbers = sum(each.numbers for each in found.values())
    assert weight_files.unpacked_bytes(directory, 2, kept_twice=False) == 2 * numbers

    copy = bitsandbytes_model(tmp_path / "plain", block=block)
    plain = {name: each for name, each in tensors.items() if name in found}
    plain |= {name: by_hand(tensors, name, each.shape, block) for name, each in packed.items()}
    save_file(plain, copy / "model.safetensors", {"format": "pt"})
    raw = json.loads((copy / "config.json").read_text())
    del raw["quantization_config"]
    (copy / "config.json").write_text(json.dumps(raw))
    tokens_N = tokens_of(decoder, [70])
    assert torch.equal(logits_of(decoder, tokens_N), logits_of(decoder_of(copy), tokens_N))


def by_hand(tensors: dict[str, Tensor], name: str, shape: Any, block: int) -> Tensor:
    """Number by number, in float32 as the library has it, rounded to the bfloat16 that the file names."""
    codes, scales = tensors[f"{name}.quant_map"], tensors[f"{name}.absmax"].long()
    scales_G = tensors[f"{name}.nested_quant_map"][scales] * tensors[f"{name}.nested_absmax"][
        torch.arange(len(scales)) // 256
    ] + torch.tensor(0.2)
    at = torch.arange(shape[0] * shape[1])
    byte = tensors[name].flatten()[at // 2].long()
    return (
        (codes[torch.where(at % 2 == 0, byte // 16, byte % 16)] * scales_G[at // block]).bfloat16().float().view(shape)
    )


STATE = ".quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("end", "part", "said"),
    [
        (".absmax", torch.zeros(3, dtype=torch.uint8), r"absmax is uint8 \[3\]; config.json makes it uint8 \[64\]"),
        ("", torch.zeros(7, 1, dtype=torch.uint8), r"is uint8 \[7, 1\]; config.json makes it uint8 \[2048, 1\]"),
        (".quant_map", torch.zeros(15), r"quant_map is float32 \[15\]"),
        (".nested_absmax", torch.zeros(1, dtype=torch.float16), "nested_absmax is float16"),
        (STATE, torch.zeros(5000, dtype=torch.uint8), r"is uint8 \[5000\]; config.json makes it uint8 \[4096\]"),
        (STATE, torch.zeros(9, dtype=torch.uint8), "is not what bitsandbytes writes"),
        (STATE, {"shape": [2, 64]}, r"says shape \[2, 64\], .*; config.json and 64 scales make it \[64"),
        (STATE, {"blocksize": 32}, "blocks of 32 and 256"), (STATE, {"blocksize": 0}, "blocks of 0 and"),
        (STATE, {"nested_blocksize": 64}, "blocks of 64 and 64"), (STATE, {"dtype": "int8"}, "not what bitsandbytes"),
        (STATE, None, r"q_proj.weight is uint8; allowed|is \[2048, 1\]"),
    ],
)  # fmt: skip
def test_parts_that_say_otherwise_are_refused_by_name(tmp_path: Path, end: str, part: Any, said: str) -> None:
    directory = bitsandbytes_model(tmp_path, kind="llama_linear")
    path, name = directory / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors: dict[str, Any] = load_file(path)
    if isinstance(part, dict):
        state = json.loads(bytes(tensors[name + STATE].tolist())) | part
        part = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{name}{end}"] = part
    save_file({key: each for key, each in tensors.items() if each is not None}, path, {"format": "pt"})
    with pytest.raises(BrokenModel, match=said):
        decoder_of(directory)
