"""Rows of the registry agree with transformers' code, and an architecture of the same kind takes one row."""

import itertools
import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from knapper import limits
from knapper.catalogue.servable import expect_config, expect_libraries
from knapper.engine.layers.lora_grouped import base
from knapper.engine.models import weight_files, weights
from knapper.engine.models.architecture import Architecture
from knapper.engine.models.config import ModelConfig, computed_by
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.fields import UnsupportedModel
from knapper.engine.models.gaps import MISSING
from knapper.engine.models.mixture_rule import never
from knapper.engine.models.registry import ARCHITECTURES
from knapper.engine.models.tensor_header import BrokenModel
from knapper.errors import InvalidField, UserError
from knapper.settings import Settings
from tests.engine.models import page
from tests.engine.strange import strange_model

SIZES: Final[dict[str, Any]] = {
    "vocab_size": 90, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 64, "pad_token_id": 0, "sliding_window": 16,
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_routed_experts": 6, "shared_expert_intermediate_size": 48,
}  # fmt: skip
LATENT: Final[dict[str, Any]] = {
    "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}  # fmt: skip
# One layer of each kind; of two none would have attention, or each experts.
MIXED: Final[dict[str, dict[str, Any]]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"], "mamba_num_heads": 4,
        "mamba_head_dim": 24, "n_groups": 2, "ssm_state_size": 16, "moe_shared_expert_intermediate_size": 48,
    },
    "deepseek_v3": {**LATENT, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 1},
    "deepseek_v32": {**LATENT, "n_group": 3, "topk_group": 2, "index_head_dim": 32, "index_n_heads": 2},
    "glm_moe_dsa": {**LATENT, "index_head_dim": 32, "index_n_heads": 2},
    "glm4_moe_lite": LATENT,
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
}  # fmt: skip


def random_model(directory: Path, model_type: str, **options: Any) -> Path:
    """`directory`, now holding a model of this type as transformers makes it, no parameter of which is neutral."""
    config = AutoConfig.for_model(model_type, **{**SIZES, **MIXED.get(model_type, {}), **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # the library has no types here
        for name, parameter in model.named_parameters():
            mean, spread = (1.0, 0.2) if "norm" in name else (0.0, 0.2)
            torch.nn.init.normal_(parameter, mean, spread)
    model.save_pretrained(directory)
    return directory


def expect_same_logits(directory: Path) -> None:
    config = ModelConfig.read(directory)
    decoder = Decoder(config, weights.load(directory, config, torch.float32))
    tokens = torch.randint(config.vocab_size, (40,), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = reference(tokens[None]).logits[0]
        logits = decoder.logits(decoder.hidden(tokens, [40], []), base)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("model_type", "attention_bias"), list(itertools.product(ARCHITECTURES, (False, True))))
def test_a_row_has_the_biases_and_norms_of_the_architecture(
    tmp_path: Path, model_type: str, attention_bias: bool
) -> None:
    directory = random_model(tmp_path, model_type, attention_bias=attention_bias)
    config, entries = ModelConfig.read(directory), weight_files.text_entries(directory)
    stored = {name: each.shape for name, each in entries.items() if not weight_files.is_unread(name, config)}
    assert dict(weight_files.promised(config, stored)) == stored
    expect_same_logits(directory)


def test_an_architecture_of_the_same_kind_takes_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = random_model(tmp_path, "seed_oss", attention_bias=True, attention_out_bias=False)
    assert computed_by(directory) == "transformers"
    with pytest.raises(UnsupportedModel, match=rf"'seed_oss'.*supported: {', '.join(ARCHITECTURES)}$"):
        ModelConfig.read(directory)
    row = Architecture("seed_oss", "Seed-OSS", output_bias=never)
    monkeypatch.setattr("knapper.engine.models.config.ARCHITECTURES", {**ARCHITECTURES, "seed_oss": row})
    assert computed_by(directory) == "native"
    expect_same_logits(directory)


@pytest.mark.parametrize(
    ("model_type", "options", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"hidden_act": "swish"}, ""),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval 0"),
        ("llama", {"mlp_bias": True}, "llama with mlp_bias"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("qwen2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ("llama", {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "expected for all layers"),
        ("qwen3_moe", {"num_experts_per_tok": 7}, "num_experts_per_tok is 7, and there are 6 experts"),
        ("qwen3_moe", {"num_experts": None}, "num_experts is None"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers 1"),
        ("qwen3_next", {"mlp_only_layers": 1}, "mlp_only_layers 1"),
        (
            "qwen3_next",
            {**MIXED["qwen3_next"], "shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size is 0",
        ),
        ("glm4_moe", {"n_group": 4}, "n_group is 4, and topk_group 1, of 6 experts"),
        ("glm4_moe", {"n_group": 3, "num_experts_per_tok": 3}, "num_experts_per_tok is 3, more than are in 1 groups"),
        ("glm4_moe", {"first_k_dense_replace": "one"}, "first_k_dense_replace 'one'"),
        ("olmoe", {"clip_qkv": 8.0}, "olmoe with clip_qkv"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "qwen3 with quantized weights"),
    ],
)
def test_a_row_refuses_options_that_the_decoder_does_not_compute(
    tmp_path: Path, model_type: str, options: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, **options}))
    if reason:
        with pytest.raises(UnsupportedModel, match=reason):
            ModelConfig.read(tmp_path)
    else:
        assert ModelConfig.read(tmp_path).model_type == model_type


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_layers_are_counted_before_they_are_listed(tmp_path: Path, model_type: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **SIZES, "num_hidden_layers": limits.model_layers_max}))
    assert computed_by(tmp_path) == ("native" if model_type == "llama" else "transformers")
    path.write_text(json.dumps({"model_type": model_type, **SIZES, "num_hidden_layers": limits.model_layers_max + 1}))
    with pytest.raises(UserError, match="num_hidden_layers is 1025; allowed: at most 1024"):
        computed_by(tmp_path)


@pytest.mark.parametrize("model_type", MISSING)
def test_a_model_that_is_refused_is_told_what_it_needs(tmp_path: Path, model_type: str) -> None:
    assert model_type not in ARCHITECTURES
    config = {"model_type": model_type, "architectures": ["AMixture"], **SIZES}
    for changed in (config, {**config, "vision_config": {}}):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=rf"'{model_type}'.*: it needs {re.escape(MISSING[model_type])}"):
            expect_config(tmp_path)
            ModelConfig.read(tmp_path)


def test_a_model_of_another_name_is_that_of_its_row(tmp_path: Path) -> None:
    """Kimi K2's files call themselves so, and are DeepSeek-V3's layers."""
    directory = strange_model(tmp_path, "deepseek_v3")
    config = ModelConfig.read(directory)
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, "model_type": "kimi_k2"}))
    assert ModelConfig.read(directory) == config
    assert expect_config(directory) == "native"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attention_bias": True, "q_lora_rank": None}, "attention_bias, and without q_lora_rank"),
        ({"num_key_value_heads": 2}, "fewer key/value heads"),
        ({"first_k_dense_replace": "1"}, "first_k_dense_replace '1'"),
        ({"mlp_layer_types": ["sparse"]}, "mlp_layer_types"),
        ({"kv_lora_rank": None}, "kv_lora_rank is None"),
    ],
)
def test_latent_attention_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    directory = strange_model(tmp_path, "deepseek_v3")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(UnsupportedModel, match=complaint):
        ModelConfig.read(directory)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    directory = random_model(tmp_path, "glm4_moe")
    assert ModelConfig.read(directory).extra_layers == 1
    tensors = load_file(directory / "model.safetensors")
    for layer, fits in ((2, True), (3, False)):
        save_file({**tensors, f"model.layers.{layer}.eh_proj.weight": torch.ones(2)}, directory / "model.safetensors")
        if fits:
            expect_same_logits(directory)
        else:
            with pytest.raises(BrokenModel, match=r"model\.layers\.3\.eh_proj"):
                weight_files.expect_promised(directory, ModelConfig.read(directory))


def test_vllm_does_not_sample_a_mixture(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **SIZES}))
    settings = Settings.load({"KNAPPER_MODEL_DIRECTORY": str(tmp_path), "KNAPPER_SAMPLER": "vllm"})
    with pytest.raises(InvalidField, match=r"KNAPPER_SAMPLER.*adapters of experts"):
        expect_libraries(settings, "native")


def test_experts_are_counted_before_they_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for experts in (limits.model_experts_max, limits.model_experts_max + 1):
        path.write_text(json.dumps({"model_type": "qwen3_moe", **SIZES, "num_experts": experts}))
        if experts <= limits.model_experts_max:
            assert ModelConfig.read(tmp_path).lora_targets[4].experts == experts
        else:
            with pytest.raises(UserError, match="num_experts is 1025; allowed: at most 1024"):
                ModelConfig.read(tmp_path)


def test_a_hybrid_may_have_no_experts(tmp_path: Path) -> None:
    """PEFT takes its MLPs for experts all the same, by the model's type."""
    directory = random_model(tmp_path, "qwen3_next", num_experts=0)
    expect_same_logits(directory)
    targets = ModelConfig.read(directory).lora_targets
    assert {t.peft_parameter for t in targets if t.part == "mlp"} == {
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [("lfm2", ["conv", "conv"]), ("lfm2", ["conv"]), ("qwen3_5_text", ["linear_attention", "sliding_attention"])],
)
def test_layers_of_other_kinds_are_refused(tmp_path: Path, model_type: str, kinds: list[str]) -> None:
    """And those of which none has attention: the context is counted in its keys and values."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **SIZES, "layer_types": kinds}))
    with pytest.raises(UnsupportedModel, match=r"layer_types is .*; expected full_attention or .* for each layer"):
        ModelConfig.read(tmp_path)


def test_the_first_releases_of_lfm2_mean_what_transformers_reads(tmp_path: Path) -> None:
    """Attention by numbers of layers, and other names for the MLP's width and a tied head: as LFM2 1.2B has them."""
    raw = {
        "model_type": "lfm2", "vocab_size": 65536, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 128000, "eos_token_id": 7,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14], "block_ff_dim": 12288, "block_auto_adjust_ff_dim": True,
        "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256, "conv_L_cache": 3, "conv_bias": False,
        "norm_eps": 1e-5, "rope_theta": 1000000.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, expected = ModelConfig.read(tmp_path), AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(expected)  # type: ignore[no-untyped-call]  # as above
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters()}
    assert dict(weight_files.promised(config)) == shapes
    assert (len(config.attention), len(config.recurrent), config.tied) == (6, 10, True)
    assert config.attention[0].rope is not None
    assert config.attention[0].rope.theta == expected.rope_parameters["rope_theta"]


def test_a_silent_config_means_what_the_architecture_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "smollm3", **SIZES, "num_hidden_layers": 8}))
    config = ModelConfig.read(tmp_path)
    reference = AutoConfig.from_pretrained(tmp_path)
    assert [index for index, layer in enumerate(config.attention) if layer.rope is None] == [3, 7]
    rope = config.attention[0].rope
    assert rope is not None
    assert rope.theta == reference.rope_parameters["rope_theta"]
    assert config.tied == reference.tie_word_embeddings


def test_the_document_has_the_tables_of_the_registry_and_of_these_tests() -> None:
    stated = page.PAGE.read_text(encoding="utf-8")
    assert page.written(stated) == stated, "python -m tests.engine.models.page writes it anew"
    assert {"llama", "mistral", "qwen2", "qwen3"} <= ARCHITECTURES.keys()
