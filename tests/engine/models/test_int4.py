"""Whole numbers of four bits of compressed-tensors are those that the library unpacks."""

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
from knapper.errors import UserError
from tests.engine.models.test_decoder import decoder_of, tokens_of
from tests.engine.models.test_packed import logits_of
from tests.engine.packed import int4_model


def unpacked(named: dict[str, Tensor], shape: tuple[int, ...], group: int) -> Tensor:
    headers = {
        f"w{end}": TensorHeader(Path("f"), f"w{end}", tuple(part.shape), str(part.dtype).removeprefix("torch."))
        for end, part in named.items()
    }
    tensor = packed_of("w", shape, headers, Packing("compressed-tensors", (1, group)))
    assert tensor is not None
    return unpack.int4(tensor, named.__getitem__)


def test_the_lowest_bits_are_the_first_number_and_eight_is_zero() -> None:
    """0x76543210 has the numbers -8, -7 and so on; a word may have more of them than a row."""
    packed = torch.tensor([[0x76543210, 0x00000089]], dtype=torch.int32)
    scale = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.bfloat16)
    named = {"_packed": packed, "_scale": scale, "_shape": torch.tensor([1, 10])}
    assert unpacked(named, (1, 10), 4).tolist() == [[-8, -7, -6, -5, -8, -6, -4, -2, 4, 0]]


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="it is not installed")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_they_are_the_librarys(dtype: torch.dtype) -> None:
    compressors = importlib.import_module("compressed_tensors.compressors.pack_quantized")
    schemes = importlib.import_module("compressed_tensors.quantization")
    args = schemes.QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    scheme = schemes.QuantizationScheme(targets=["Linear"], weights=args)
    draw = torch.Generator().manual_seed(0)
    named = {
        "_packed": torch.randint(-(2**31), 2**31, (40, 12), generator=draw).int(),
        "_scale": (0.05 * torch.rand(40, 3, generator=draw)).to(dtype),
        "_shape": torch.tensor([40, 96]),
    }
    state = {f"weight{end}": part for end, part in named.items()}
    expected = compressors.PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(unpacked(named, (40, 96), 32), expected)


def test_a_packed_model_computes_what_its_plain_copy_does(tmp_path: Path) -> None:
    directory = int4_model(tmp_path / "packed")
    assert servable.expect_config(directory) == "native"
    decoder, tensors = decoder_of(directory), load_file(directory / "model.safetensors")
    found = weight_files.expect_promised(directory, ModelConfig.read(directory))
    plain = {name: tensors[name] for name in found if name in tensors}
    packed = [name for name, each in found.items() if isinstance(each, PackedTensor)]
    assert len(packed) == 24, "eight experts of three linears"
    for name in packed:
        words, scale = tensors[f"{name}_packed"].long() & 0xFFFFFFFF, tensors[f"{name}_scale"].float()
        columns = torch.arange(found[name].shape[1])
        numbers = (words[:, columns // 8] // 16 ** (columns % 8)) % 16 - 8
        plain[name] = (numbers * scale[:, columns // 16]).bfloat16().float()
    copy = int4_model(tmp_path / "plain")
    save_file(plain, copy / "model.safetensors", {"format": "pt"})
    raw = json.loads((copy / "config.json").read_text())
    del raw["quantization_config"]
    (copy / "config.json").write_text(json.dumps(raw))
    tokens_N = tokens_of(decoder, [70])
    assert torch.equal(logits_of(decoder, tokens_N), logits_of(decoder_of(copy), tokens_N))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_bits": 8}, {"type": "float"}, {"symmetric": False}, {"strategy": "channel", "group_size": None},
        {"group_size": 0}, {"group_size": "x"}, {"actorder": "group"},
    ],
    ids=str,
)  # fmt: skip
def test_other_kinds_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    directory = int4_model(tmp_path)
    raw = json.loads((directory / "config.json").read_text())
    raw["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"of another kind .*read are pack-quantized whole numbers of four bits"):
        servable.expect_files(directory)


@pytest.mark.parametrize("change", [{"format": "nvfp4-pack-quantized"}, {"config_groups": []}, {"config_groups": {}}])
def test_other_formats_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    directory = int4_model(tmp_path)
    raw = json.loads((directory / "config.json").read_text())
    raw["quantization_config"] |= change
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="of another kind"):
        servable.expect_files(directory)


def test_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    directory = int4_model(tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("weight_shape"))
    for part, wrong, said in (
        (name, torch.tensor([3, 4]), r"weight_shape says \[3, 4\]; config.json makes it"),
        (name.replace("_shape", "_scale"), torch.zeros(2, 2), r"weight_scale is float32 \[2, 2\]"),
    ):
        save_file({**tensors, part: wrong}, path, {"format": "pt"})
        with pytest.raises(BrokenModel, match=said):
            decoder_of(directory)
