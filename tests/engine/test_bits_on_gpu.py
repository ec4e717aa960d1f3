"""KNAPPER_BATCH_INVARIANT: where bits are promised, and that a GPU which keeps them computes as a CPU does."""

from collections.abc import Iterator

import pytest
import torch

from knapper.engine.layers import varlen_attention
from knapper.engine.layers.attention import attention_dtype
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.layers.determinism import keeps_bits
from knapper.engine.models.layer import ScoreRule
from knapper.engine.models.preflight import expect_device
from knapper.errors import InvalidField
from knapper.settings import Settings
from tests.engine.gpu import Driver, with_gpu

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _switched_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # and unset at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize(("setting", "kept"), [("auto", False), ("false", False), ("true", True)])
def test_a_gpu_keeps_bits_if_it_is_asked_to(monkeypatch: pytest.MonkeyPatch, setting: str, kept: bool) -> None:
    with_gpu(monkeypatch, Driver())
    device = expect_device(Settings.load({"KNAPPER_BATCH_INVARIANT": setting}))
    assert device == GPU
    assert keeps_bits(device) is kept
    assert torch.are_deterministic_algorithms_enabled() is kept
    assert Exactness(promised=setting != "false").probes(device) is kept


def test_then_it_attends_as_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, Driver())
    assert attention_dtype(torch.bfloat16, GPU) == torch.bfloat16
    expect_device(Settings.load({"KNAPPER_BATCH_INVARIANT": "true"}))
    assert attention_dtype(torch.bfloat16, GPU) == torch.float32
    rows = torch.empty(1, 1, 16, dtype=attention_dtype(torch.bfloat16, GPU), device="meta")
    assert not varlen_attention.computes(rows, ScoreRule(1.0))


def test_on_a_cpu_the_setting_does_not_touch_torchs_switch() -> None:
    device = expect_device(Settings.load({"KNAPPER_BATCH_INVARIANT": "true", "KNAPPER_DEVICE": "cpu"}))
    assert keeps_bits(device)
    assert not torch.are_deterministic_algorithms_enabled()


def test_another_value_is_refused_with_those_that_are_allowed() -> None:
    with pytest.raises(InvalidField, match="KNAPPER_BATCH_INVARIANT is 'yes'; allowed: auto, true, false"):
        Settings.load({"KNAPPER_BATCH_INVARIANT": "yes"})
