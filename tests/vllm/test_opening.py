"""Where vLLM computes is its build's affair: a setting that says otherwise is refused, not ignored."""

import pytest

from knapper.errors import InvalidField
from knapper.vllm.opening import device_for


def test_a_device_that_this_vllm_is_not_built_for_is_refused() -> None:
    assert device_for("auto", "cpu") == device_for("cpu", "cpu") == "cpu"
    assert device_for("auto", "cuda") == device_for("cuda", "cuda") == "cuda"
    with pytest.raises(InvalidField, match="KNAPPER_DEVICE is 'cuda'; allowed: auto or cpu with KNAPPER_SAMPLER=vllm"):
        device_for("cuda", "cpu")
    with pytest.raises(InvalidField, match="KNAPPER_DEVICE is 'cpu'; allowed: auto or cuda"):
        device_for("cpu", "cuda")
