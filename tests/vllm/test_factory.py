"""Where vLLM computes is its build's affair: a setting that says otherwise is refused. Its memory is what is left."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knapper.engine.models.config import ModelConfig
from knapper.errors import InvalidField
from knapper.vllm.factory import device_for, on_cpu
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
