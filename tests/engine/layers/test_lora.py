"""Which linears an adapter touches, where its numbers lie, and that it begins the same wherever it begins."""

from pathlib import Path
from typing import Any

import pytest
import torch

from knapper import limits
from knapper.engine.layers.lora import Layout, layout
from knapper.engine.models.config import ModelConfig
from knapper.errors import InvalidField
from tests.engine.runs import spec
from tests.engine.strange import strange_model
from tests.engine.tiny import hidden, inner, layers, tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.read(tiny_model(tmp_path_factory.mktemp("model"), kind="qwen3"))


def in_layers(names: list[str]) -> list[str]:
    return [f"layers.{i}.{name}" for i in range(layers) for name in names]


@pytest.mark.parametrize(
    ("attn", "mlp", "unembed", "wanted"),
    [
        (True, False, False, in_layers(ATTENTION)),
        (False, True, False, in_layers(MLP)),
        (False, False, True, ["lm_head"]),
        (True, True, True, [*in_layers(ATTENTION + MLP), "lm_head"]),
    ],
)
def test_flags_choose_the_sites_in_the_documented_order(
    config: ModelConfig, attn: bool, mlp: bool, unembed: bool, wanted: list[str]
) -> None:
    adapter_layout = layout(config, spec(train_attn=attn, train_mlp=mlp, train_unembed=unembed))
    assert [target.name for target in adapter_layout.lora_targets] == wanted


def test_shapes_follow_the_model_whose_heads_do_not_add_up_to_its_hidden_size(config: ModelConfig) -> None:
    adapter_layout = layout(config, spec(rank=3, train_unembed=True))
    lora = adapter_layout.lora(torch.zeros(adapter_layout.numel), 1.0)
    q, kv = config.attention[0].q_width, config.attention[0].kv_width
    assert q != hidden
    wanted = {
        "q_proj": (hidden, q), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (q, hidden),
        "gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden),
        "lm_head": (hidden, config.vocab_size),
    }  # fmt: skip
    for target in adapter_layout.lora_targets:
        inputs, outputs = wanted[target.name.rpartition(".")[2]]
        assert lora.a[target.name].shape == (3, inputs)
        assert lora.b[target.name].shape == (outputs, 3)


def test_the_views_cover_the_arena_once(config: ModelConfig) -> None:
    adapter_layout = layout(config, spec(train_unembed=True))
    arena = torch.zeros(adapter_layout.numel)
    for _, a, b in adapter_layout.matrices(arena):
        a.add_(1)
        b.add_(1)
    assert torch.equal(arena, torch.ones(adapter_layout.numel))


def test_an_adapter_begins_as_pefts_does(config: ModelConfig) -> None:
    adapter_layout = layout(config, spec(rank=16))
    for target, a, b in adapter_layout.matrices(adapter_layout.initial(0)):
        bound = target.inputs**-0.5
        assert not b.any()
        assert a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert abs(a.mean().item()) < 0.1 * bound


def test_the_seed_alone_decides_how_it_begins(config: ModelConfig) -> None:
    adapter_layout = layout(config, spec())
    first = adapter_layout.initial(3)
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.get_rng_state()
    assert torch.equal(adapter_layout.initial(3), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(adapter_layout.initial(4), first)


def test_targets_that_come_later_do_not_move_the_earlier_ones(config: ModelConfig) -> None:
    plain, more = layout(config, spec()), layout(config, spec(train_unembed=True))
    assert torch.equal(more.initial(5)[: plain.numel], plain.initial(5))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": -4}, "rank is -4; allowed: 1 to 256"),
        ({"rank": limits.rank_max + 1}, "rank is 257"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"seed": limits.seed_max + 1}, "seed"),
        ({"seed": limits.seed_min - 1}, "seed"),
        ({"train_attn": False, "train_mlp": False}, "at least one of them True"),
    ],
)
def test_a_spec_that_cannot_be_trained_is_refused(config: ModelConfig, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField, match=field):
        layout(config, spec(**changes))


@pytest.mark.parametrize(
    "changes", [{"rank": 1}, {"rank": limits.rank_max}, {"seed": limits.seed_max}, {"seed": limits.seed_min}]
)
def test_the_limits_themselves_are_allowed(config: ModelConfig, changes: dict[str, Any]) -> None:
    chosen = spec(train_attn=False, **changes)
    assert layout(config, chosen).initial(chosen.seed).isfinite().all()


def test_what_is_rounded_for_products_leaves_out_experts_which_are_nearly_all(tmp_path: Path) -> None:
    """They round their pairs layer by layer: a copy of all of them would be held for nothing."""
    mixture = ModelConfig.read(strange_model(tmp_path, "qwen3_moe"))
    whole = layout(mixture, spec(rank=4, train_unembed=True))
    arena = torch.arange(whole.numel, dtype=torch.float32) / whole.numel
    lora, rounded = whole.lora(arena, 2.0), whole.rounded(arena, 2.0, torch.bfloat16)
    assert set(rounded.a) == {target.name for target in whole.lora_targets if target.experts is None} < set(lora.a)
    for name in rounded.a:
        assert torch.equal(rounded.a[name], lora.a[name].bfloat16())
        assert torch.equal(rounded.b[name], lora.b[name].bfloat16())
    experts = Layout(4, tuple(target for target in whole.lora_targets if target.experts is not None))
    assert experts.rounded(torch.zeros(experts.numel), 1.0, torch.bfloat16).a == {}
