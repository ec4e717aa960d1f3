"""Weights that files have in few bits are those that transformers makes of the same files."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from knapper.catalogue import servable
from knapper.engine.layers.lora_grouped import Segment, base
from knapper.engine.models import unpack, weight_files
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.packed import PackedTensor
from knapper.engine.models.tensor_header import BrokenModel
from knapper.errors import UserError
from tests.engine.models.test_decoder import decoder_of, tokens_of
from tests.engine.packed import fp8_model, mxfp4_model

MAKERS: dict[str, Callable[[Path], Path]] = {
    "mxfp4": mxfp4_model,
    "fp8": fp8_model,
    "fp8 of latents": partial(fp8_model, kind="deepseek_v3"),
}


def logits_of(decoder: Decoder, tokens_N: Tensor) -> Tensor:
    rows = len(tokens_N)
    with torch.no_grad():
        return decoder.logits(decoder.hidden(tokens_N, [rows], [Segment(0, rows, None)]), base)


def unpacked_by_transformers(directory: Path) -> torch.nn.Module:
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    of = getattr(transformers, {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}[config["quant_method"]])
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", quantization_config=of(dequantize=True)
    )
    return model.to(torch.float32)


@pytest.mark.parametrize("method", MAKERS)
def test_packed_weights_are_those_that_transformers_makes_of_them(tmp_path: Path, method: str) -> None:
    """Bit for bit, in float32: the exact products of what the files have."""
    directory = MAKERS[method](tmp_path)
    config = ModelConfig.read(directory)
    expected = _by_expert(dict(unpacked_by_transformers(directory).named_parameters()))
    parts, packed = load_file(directory / "model.safetensors"), 0
    for name, tensor in weight_files.expect_promised(directory, config).items():
        if isinstance(tensor, PackedTensor):
            found = unpack.unpacked(tensor, lambda end, at=name: parts[f"{at}{end}"], torch.float32)  # type: ignore[misc]  # of a default
            assert torch.equal(found.float(), expected[name]), name
            packed += 1
    assert packed
    assert servable.expect_config(directory) == "native"


def _by_expert(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the linears of each expert beside those of all, as files of fp8 have them."""
    found = dict(named)
    for name, joined in named.items():
        block, _, parameter = name.rpartition(".")
        for expert, matrix in enumerate(joined if block.endswith("experts") and joined.dim() == 3 else ()):
            halves = zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True)
            each = halves if parameter == "gate_up_proj" else [("down_proj", matrix)]
            found |= {f"{block}.{expert}.{linear}.weight": one for linear, one in each}
    return found


def test_blocks_that_a_matrix_cuts_are_those_of_its_first_rows_and_columns() -> None:
    """As DeepSeek's own code has it (its `kv_a_proj_with_mqa` is of 576 rows); transformers refuses such a file."""
    weight, scale = torch.ones(5, 7).to(torch.float8_e4m3fn), torch.arange(1.0, 5.0).view(2, 2)
    wide = unpack.fp8(weight, scale, (3, 4), torch.float32)
    assert wide.tolist() == 3 * [[1.0] * 4 + [2.0] * 3] + 2 * [[3.0] * 4 + [4.0] * 3]


@pytest.mark.parametrize("method", MAKERS)
def test_a_packed_model_computes_what_transformers_does_and_its_plain_copy(tmp_path: Path, method: str) -> None:
    directory = MAKERS[method](tmp_path / "packed")
    decoder, reference = decoder_of(directory), unpacked_by_transformers(directory)
    tokens_N = tokens_of(decoder, [70])
    logits_NV = logits_of(decoder, tokens_N)
    with torch.no_grad():
        expected_NV = reference(input_ids=tokens_N[None]).logits[0]
    torch.testing.assert_close(logits_NV, expected_NV, atol=2e-5, rtol=1e-5)
    bytes_of = [weight_files.unpacked_bytes(directory, 2, kept_twice=twice) for twice in (False, True)]
    numbers = sum(each.numbers for each in weight_files.expect_promised(directory, decoder.config).values())
    assert bytes_of[0] == 2 * numbers
    assert 3 * numbers < bytes_of[1] < 4 * numbers, "most weights are packed"


@pytest.mark.parametrize("method", MAKERS)
def test_parts_that_are_missing_or_of_another_shape_are_refused_by_name(tmp_path: Path, method: str) -> None:
    directory = MAKERS[method](tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(("_scales", "_scale_inv")))
    for changed, complaint in (
        ({**tensors, name: tensors[name][:-1].clone()}, rf"{name} is .*; config.json makes it"),
        ({each: tensor for each, tensor in tensors.items() if each != name}, "missing|is float8_e4m3fn; allowed"),
    ):
        save_file(changed, path, {"format": "pt"})
        with pytest.raises(BrokenModel, match=complaint):
            decoder_of(directory)


@pytest.mark.parametrize(
    ("quantization", "complaint"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'; read are mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "has no load_in_4bit; read are four bits"),
        ({"quant_method": "fp8"}, r"weight_block_size is None; supported in fp8: two sizes"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size is \[128, 0\]"),
        ([], r"quant_method \[\]"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, quantization: Any, complaint: str) -> None:
    directory = mxfp4_model(tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UserError, match=complaint):
        ModelConfig.read(directory)
    with pytest.raises(UserError, match=f"{complaint}|quantized weights"):
        servable.expect_files(directory)
