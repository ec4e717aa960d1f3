"""Where vLLM computes is its build's affair: a setting that says otherwise is refused. Its memory is what is left."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knapper.engine.models.config import ModelConfig
from knapper.errors import InvalidField
from knapper.settings import Settings
from knapper.vllm.factory import device_for, fitting, on_cpu, on_gpu
from tests.engine.wide_keys import wide_model

GIB = 2**30


def test_a_device_that_this_vllm_is_not_built_for_is_refused() -> None:
    assert device_for("auto", "cpu") == device_for("cpu", "cpu") == "cpu"
    assert device_for("auto", "cuda") == device_for("cuda", "cuda") == "cuda"
    with pytest.raises(InvalidField, match="KNAPPER_DEVICE is 'cuda'; allowed: auto or cpu with KNAPPER_SAMPLER=vllm"):
        device_for("cuda", "cpu")
    with pytest.raises(InvalidField, match="KNAPPER_DEVICE is 'cpu'; allowed: auto or cuda"):
        device_for("cpu", "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_context_fits_into_the_whole_gib_of_vllm_or_is_cut_to_them(tmp_path: Path, dtype: torch.dtype) -> None:
    """Keys and values of Qwen3-0.6B: 40,960 positions take 8.75 GiB in float32, half of that in bfloat16."""
    facts = ModelConfig.read(wide_model(tmp_path, layers=28))
    token_bytes = 28 * 2 * 8 * 128 * dtype.itemsize
    needed = 9 if dtype == torch.float32 else 5
    assert on_cpu(facts, dtype, 12 * GIB, 0) == (needed * GIB, 40_960)
    assert on_cpu(facts, dtype, 64 * GIB, 0) == (16 * GIB, 40_960)
    kv, context = on_cpu(facts, dtype, 5 * GIB, 0)
    assert kv == 3 * GIB, "three quarters, in whole GiB"
    assert context == 3 * GIB // token_bytes // 128 * 128 < 40_960
    assert on_cpu(facts, dtype, 0, 0)[0] == GIB, "vLLM takes no less"
    most_bytes = 64 * 1024 * token_bytes  # of all sequences that decode at once
    assert on_cpu(replace(facts, context=1000), dtype, 640 * GIB, 0.25) == (-(-most_bytes // GIB) * GIB, 1000)


def test_what_of_a_context_fits_a_gpu_is_known_before_vllm_starts(tmp_path: Path) -> None:
    """Keys and values of Qwen3-0.6B in bfloat16, 112 KiB a token; adapters have slots of their own."""
    facts = ModelConfig.read(wide_model(tmp_path, layers=28))
    token_bytes = 28 * 2 * 8 * 128 * 2
    assert on_gpu(facts, torch.bfloat16, 20 * GIB, 8, 64) == facts.context == 40_960
    few, more = (on_gpu(facts, torch.bfloat16, 5 * GIB, adapters, 64) for adapters in (8, 1))
    assert 0 < few < more <= 2 * GIB // token_bytes
    assert few % 128 == more % 128 == 0
    assert on_gpu(facts, torch.bfloat16, 1 * GIB, 8, 64) == on_gpu(facts, torch.bfloat16, -GIB, 8, 64) == 0


def test_a_context_that_was_asked_for_and_does_not_fit_ends_the_start() -> None:
    own, asked = Settings.load({}), Settings.load({"KNAPPER_CONTEXT": "8000", "KNAPPER_VLLM_MEMORY": "0.4"})
    assert fitting(40_960, 50_000, own) == 40_960
    assert fitting(40_960, 6_144, own) == 6_144
    assert fitting(8_000, 8_064, asked) == 8_000
    assert fitting(100, 100, own) == 100
    with pytest.raises(InvalidField, match="KNAPPER_CONTEXT is 8000; allowed: up to 6144, for which vLLM has memory"):
        fitting(8_000, 6_144, asked)
    with pytest.raises(InvalidField, match=r"KNAPPER_VLLM_MEMORY is 0\.4; allowed: what holds the weights and a text"):
        fitting(8_000, 0, asked)
