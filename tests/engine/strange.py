"""Tiny random models of other kinds than `tiny`, written by transformers: those that the native code computes, and
some that it leaves to transformers.
"""

import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.engine.tiny import context, tiny_model

_SIZES: Final[dict[str, Any]] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": context, "pad_token_id": 0,
}  # fmt: skip
_GROUPED: Final = {**_SIZES, "num_key_value_heads": 2}
_HEADED: Final = {**_GROUPED, "head_dim": 16}
_PLAIN: Final = {"rope_type": "default", "rope_theta": 1e4}
_LINEAR: Final = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}
_YARN: Final = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": context // 8,
}  # fmt: skip
_LLAMA3: Final = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": context // 8,
}  # fmt: skip
_LONG: Final = {
    "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "long_factor": [4.0] * 6,
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0], "original_max_position_embeddings": 256,
}  # fmt: skip
_SLIDING: Final = {"sliding_window": 16}
_MIXED: Final = {**_GROUPED, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_SWITCHED: Final = {**_SLIDING, "use_sliding_window": True, "max_window_layers": 1}
_DELTA: Final = {
    **_HEADED, "head_dim": 32, "layer_types": ["full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 32,
}  # fmt: skip
_MAMBA: Final = {
    **{name: value for name, value in _HEADED.items() if name != "num_hidden_layers"},
    "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 48, "moe_shared_expert_intermediate_size": 80,
    "routed_scaling_factor": 1.5,
}  # fmt: skip
_LATENT: Final = {
    **_SIZES, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 48, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "moe_intermediate_size": 48, "n_shared_experts": 1, "routed_scaling_factor": 1.5, "num_mtp_layers": 0,
}  # fmt: skip
_INDEX: Final = {"index_topk": 256, "index_head_dim": 32, "index_n_heads": 2}
_SHARED_INDEX: Final = ["full", "shared"]
_EXPERTS: Final = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80,
}  # fmt: skip

# One layer with a window of 16 and one without wherever the architecture has both; contexts that are scaled from 64 on.
NATIVE: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "llama3": ("LlamaConfig", {**_GROUPED, "attention_bias": True, "rope_parameters": _LLAMA3}),
    "llama_linear": ("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True, "rope_parameters": _LINEAR}),
    "mistral": ("MistralConfig", {**_HEADED, **_SLIDING}),
    "qwen2": ("Qwen2Config", {**_GROUPED, **_SWITCHED}),
    "qwen3_window": ("Qwen3Config", {**_GROUPED, **_SWITCHED, "head_dim": 32}),
    "qwen3_yarn": ("Qwen3Config", {**_GROUPED, "head_dim": 32, "rope_parameters": _YARN}),
    "smollm3": ("SmolLM3Config", {**_GROUPED, "no_rope_layer_interval": 2}),
    "granite": (
        "GraniteConfig",
        {
            **_GROUPED,
            "logits_scaling": 4.0,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "phi3": ("Phi3Config", {**_GROUPED, **_SLIDING}),
    "phi4": ("Phi3Config", {**_GROUPED, "original_max_position_embeddings": 256, "rope_parameters": _LONG}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "olmo3": (
        "Olmo3Config",
        {
            **_GROUPED,
            **_SLIDING,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"full_attention": {**_YARN, "attention_factor": 1.2}, "sliding_attention": _PLAIN},
        },
    ),
    "gemma": ("GemmaConfig", _HEADED),
    "gemma2": (
        "Gemma2Config",
        {
            **_HEADED,
            **_SLIDING,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_HEADED,
            **_SLIDING,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {"full_attention": _LINEAR, "sliding_attention": _PLAIN},
        },
    ),
    "glm": ("GlmConfig", _HEADED),
    "glm4": ("Glm4Config", _HEADED),
    "qwen3_moe": ("Qwen3MoeConfig", {**_MIXED, "head_dim": 32, "norm_topk_prob": True}),
    "qwen3_moe_window": (
        "Qwen3MoeConfig",
        {**_MIXED, **_SLIDING, "head_dim": 16, "use_sliding_window": True, "decoder_sparse_step": 2},
    ),
    "olmoe": ("OlmoeConfig", {**_MIXED, "intermediate_size": 48, "rope_parameters": _LINEAR}),
    "mixtral": ("MixtralConfig", {**_MIXED, **_SLIDING, "intermediate_size": 48, "num_experts_per_tok": 3}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **_HEADED,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 48,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "num_mtp_layers": 0,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **_LATENT,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "deepseek_v32": (
        "DeepseekV32Config",
        {
            **_LATENT,
            **_INDEX,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "mlp_layer_types": ["dense", "sparse"],
            "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsaConfig",
        {**_LATENT, **_INDEX, "v_head_dim": 40, "mlp_layer_types": ["dense", "sparse"], "indexer_types": _SHARED_INDEX},
    ),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", {**_LATENT, "q_lora_rank": None, "v_head_dim": 40}),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_HEADED,
            **_SLIDING,
            "intermediate_size": 48,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "swiglu_limit": 1.5,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    "lfm2": (
        "Lfm2Config",
        {
            **_GROUPED,
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 48,
            "block_ffn_dim_multiplier": 1.2,
        },
    ),
    "lfm2_bias": (
        "Lfm2Config",
        {**_GROUPED, "full_attn_idxs": [0], "conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False},
    ),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **_GROUPED,
            "layer_types": ["full_attention", "conv"],
            "num_dense_layers": 1,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "routed_scaling_factor": 1.5,
        },
    ),
    "nemotron_h": ("NemotronHConfig", {**_MAMBA, "layers_block_type": ["linear_attention", "moe", "full_attention"]}),
    "nemotron_h_latent": (
        "NemotronHConfig",
        {
            **_MAMBA,
            "layers_block_type": ["moe", "linear_attention", "mlp", "full_attention"],
            "moe_latent_size": 32,
            "use_conv_bias": False,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "qwen3_5": ("Qwen3_5TextConfig", _DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {**_DELTA, **_EXPERTS}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_DELTA, **_EXPERTS, "norm_topk_prob": False, "mlp_only_layers": [0]},
    ),
    "qwen3_next_moe": ("Qwen3NextConfig", {**_DELTA, **_EXPERTS}),
    "smollm3_window": ("SmolLM3Config", {**_GROUPED, **_SWITCHED, "no_rope_layer_interval": 2}),
}
MIXTURES: Final = (
    "qwen3_moe",
    "qwen3_moe_window",
    "olmoe",
    "mixtral",
    "glm4_moe",
    "deepseek_v3",
    "deepseek_v32",
    "glm_moe_dsa",
    "glm4_moe_lite",
    "gpt_oss",
    "lfm2_moe",
    "nemotron_h",
    "nemotron_h_latent",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen3_next_moe",
)
HYBRIDS: Final = tuple(kind for kind in NATIVE if kind.startswith(("lfm2", "nemotron", "qwen3_5", "qwen3_next")))
# Left to transformers. Among them: fused query, key and value; biases everywhere, on the head too; layers in parallel;
# scaled heads; caps on attention and logits with windows; LayerNorms; options that the native code lacks.
FOREIGN: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "phi": ("PhiConfig", _SIZES),
    "cohere2": ("Cohere2Config", {**_GROUPED, **_SLIDING, "logit_scale": 0.25}),
    "vaultgemma": ("VaultGemmaConfig", {**_HEADED, **_SLIDING, "final_logit_softcapping": 1.0}),
    "llama_mlp_bias": ("LlamaConfig", {**_GROUPED, "mlp_bias": True}),
    "apertus": ("ApertusConfig", _GROUPED),
    "arcee": ("ArceeConfig", _GROUPED),
    "cohere": ("CohereConfig", _GROUPED),
    "ernie4_5": ("Ernie4_5Config", _HEADED),
    "exaone4": ("Exaone4Config", {**_GROUPED, **_SLIDING}),
    "falcon": ("FalconConfig", {name: value for name, value in _SIZES.items() if name != "intermediate_size"}),
    "gemma3n": (
        "Gemma3nTextConfig",
        {
            **_HEADED,
            **_SLIDING,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 270,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {**_HEADED, **_SLIDING, "vocab_size_per_layer_input": 270, "hidden_size_per_layer_input": 8},
    ),
    "granite_hybrid": (
        "GraniteMoeHybridConfig",
        {
            **_GROUPED,
            "layer_types": ["attention", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
        },
    ),
    "helium": ("HeliumConfig", _HEADED),
    "hunyuan": ("HunYuanDenseV1Config", _HEADED),
    "jais2": ("Jais2Config", _GROUPED),
    "ministral": ("MinistralConfig", {**_HEADED, **_SLIDING}),
    "ministral3": ("Ministral3Config", _HEADED),
    "nemotron": ("NemotronConfig", _GROUPED),
    "olmo": ("OlmoConfig", _GROUPED),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}),
    "seed_oss": ("SeedOssConfig", _HEADED),
    "stablelm": ("StableLmConfig", _GROUPED),
    "starcoder2": ("Starcoder2Config", _GROUPED),
}
CONFIGS: Final = {**NATIVE, **FOREIGN}


def strange_model(directory: Path, kind: str, *, seed: int = 0, **changes: Any) -> Path:
    """`directory`, now holding a model of another architecture with the tiny tokenizer; no parameter is neutral."""
    tiny_model(directory)
    (directory / "model.safetensors").unlink()
    before = json.loads((directory / "config.json").read_text())
    ids = {name: before[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    class_name, values = CONFIGS[kind]
    config = getattr(transformers, class_name)(**{**values, **ids, **changes})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # the library has no types here
        for name, parameter in model.named_parameters():  # every layer matters, more than the token itself
            if name.endswith("_bias"):  # of experts
                torch.nn.init.normal_(parameter, std=0.1)
            elif parameter.dim() > 2:  # a convolution's
                torch.nn.init.normal_(parameter, std=0.5)
            elif parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08 if "embed" in name else 1.5 * 64**-0.5)
            elif name.endswith("A_log"):  # so that memories decay over a few rows and over many
                torch.nn.init.normal_(parameter, mean=-2.5, std=1.5)
            elif name.endswith(("bias", "sinks")):
                torch.nn.init.normal_(parameter, std=0.1)
            elif kind in NATIVE:  # a norm's, around its neutral value
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith(("correction_bias", "expert_bias")):
                torch.nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(directory)
    return directory
