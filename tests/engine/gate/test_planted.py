"""The gate turns red: faults as somebody could write them, each planted, and seen."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from knapper.engine import memory
from knapper.engine.layers import paged_attention
from knapper.engine.layers.attention import ContinuedAttention
from knapper.engine.layers.checkpointing import PassBytes
from knapper.engine.models import preflight
from knapper.engine.models.decode import NativeDecodeState
from knapper.engine.models.layer import ScoreRule
from knapper.engine.sampling import scheduler
from knapper.settings import Settings
from tests.engine.gate import checks
from tests.engine.gate.conftest import expect_reference
from tests.engine.gate.meter import Counts
from tests.engine.gate.models import write_model
from tests.engine.gate.phases import Bench, bench, prompt
from tests.engine.gpu import Driver, with_gpu

pytestmark = pytest.mark.timeout(300)  # on a machine that does much else
_MODEL = "Llama-3.2-3B"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    directory: Path = tmp_path_factory.mktemp("model")
    with bench(write_model(directory, _MODEL)) as one:
        expect_reference(one)
        yield one


def _one_step(one: Bench) -> Counts:
    _, steps = one.sample([(prompt(20), "")], 1 << 14, max_tokens=2)
    return steps[-1]


def _seen(found: list[str], words: str) -> bool:
    return any(words in complaint for complaint in found)


def test_a_device_without_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpu(monkeypatch, Driver())
    settings = Settings.load({"KNAPPER_GPU_MEMORY_SHARE": "0.5"})
    assert checks.started(settings) == []
    monkeypatch.setattr(preflight, "device_for", lambda _: torch.device("cuda"))
    assert _seen(checks.started(settings), "Expected a torch.device with a specified index")


def test_float32_scores(llama: Bench) -> None:
    phase = "prefill of 512"
    assert checks.complaints(_MODEL, phase, checks.counted(llama, phase)) == []
    llama.decoder.attention_dtype = torch.float32
    try:
        found = checks.complaints(_MODEL, phase, checks.counted(llama, phase))
    finally:
        llama.decoder.attention_dtype = torch.bfloat16
    assert _seen(found, "of the products are float32"), found


def test_a_budget_that_ignores_the_card(llama: Bench) -> None:
    """Rows and kept layers as on a large card, on a small one: as the engine once had them for every card."""
    large = checks.account(llama, memory.CARDS["H100 (80 GB)"])
    small = checks.account(llama, memory.CARDS["L4 (24 GB)"])
    planted = replace(small, rows_max=large.rows_max, passes=large.passes)
    assert _seen(checks.over_budget(llama, memory.CARDS["L4 (24 GB)"], planted), "the card has")
    keeps_a_quarter = PassBytes(memory.CARDS["L4 (24 GB)"] // 4, 0, small.passes.layer_row if small.passes else 1)
    planted = replace(small, rows_max=8192, passes=keeps_a_quarter, weights=small.weights, runs=0)
    assert _seen(checks.over_budget(llama, memory.CARDS["L4 (24 GB)"], planted), "the card has")
    expect_reference(llama)


def _masked(
    self: ContinuedAttention, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, *, scores: ScoreRule
) -> Tensor:
    """The rest of a text after its beginning, by a mask: no kernel takes it with grouped queries."""
    keys, values = self._past_kv[layer]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_NHD, torch.cat([keys, k_NGD]), torch.cat([values, v_NGD])))
    tokens, total = q.shape[2], k.shape[2]
    mask = torch.ones(tokens, total, dtype=torch.bool, device=q.device).tril_(total - tokens)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale, enable_gqa=True)
    return o[0].transpose(0, 1).reshape(tokens, -1)


def test_a_masked_grouped_attention(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = "prefill of 8,192 after 1,024"
    monkeypatch.setattr(ContinuedAttention, "__call__", _masked)
    found = checks.complaints(_MODEL, phase, checks.continued(llama))
    assert _seen(found, "kernels; allowed"), found
    assert _seen(found, "GiB held; allowed"), found


def test_a_pageable_copy(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention, "to_device", lambda values, device: torch.tensor(values, device=device))
    found = checks.complaints(_MODEL, "decode, 8 texts", _one_step(llama))
    assert _seen(found, "a pageable copy: engine/layers/paged_attention.py"), found


def test_an_item(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = NativeDecodeState.step

    def step(self: NativeDecodeState, *args: object) -> Tensor:
        logits = before(self, *args)  # type: ignore[arg-type]  # it passes on what it gets
        assert logits.max().item() == 1.0
        return logits

    monkeypatch.setattr(NativeDecodeState, "step", step)
    found = checks.complaints(_MODEL, "decode, 8 texts", _one_step(llama))
    assert _seen(found, "waits for the device"), found


def test_an_index_that_was_left_on_the_host(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "to_device", lambda values, _: torch.tensor(values))
    found = checks.complaints(_MODEL, "decode, 8 texts", _one_step(llama))
    assert _seen(found, "mixed devices: aten::"), found
