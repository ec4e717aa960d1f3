"""Models at their true sizes: config.json as published, and weight files that are all hole.

The loader reads the headers and maps the files; on the meta device no byte of theirs is read.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, Final, cast

import torch

from knapper.engine.models.config import ModelConfig
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.loader import load
from knapper.engine.models.weight_files import promised

META: Final = torch.device("meta")
_SHARD_BYTES: Final = 4 << 30  # no system maps more at once than it has memory
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "Qwen3-8B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
        "tie_word_embeddings": False, "hidden_act": "silu", "eos_token_id": 151645,
    },
    "Llama-3.2-3B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 8192,
        "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True, "hidden_act": "silu", "eos_token_id": 128001,
    },
    "Gemma-3-12B, text": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 3840,
        "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
        "intermediate_size": 15360, "vocab_size": 262208, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
        "hidden_activation": "gelu_pytorch_tanh", "eos_token_id": 106,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "hidden_act": "silu", "decoder_sparse_step": 1,
        "mlp_only_layers": [], "eos_token_id": 151645,
    },
}  # fmt: skip
# A model of a layer for one that takes minutes to load: what it asks beside that of a dense one shows in each layer.
REDUCED: Final = {"Qwen3-30B-A3B, a layer": CONFIGS["Qwen3-30B-A3B"] | {"num_hidden_layers": 1}}

# Of these no phase is counted: one device does not hold them (tests/engine/ranks/test_plan.py).
SPREAD: Final[dict[str, dict[str, Any]]] = {
    "Llama-3.3-70B": CONFIGS["Llama-3.2-3B"] | {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672,
        "tie_word_embeddings": False,
    },
    "Qwen3-235B-A22B, two layers": CONFIGS["Qwen3-30B-A3B"] | {
        "hidden_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 64, "moe_intermediate_size": 1536,
    },
}  # fmt: skip


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_model(directory: Path, name: str) -> Path:
    """The model's directory: its weights in bfloat16, without a block on the disk."""
    write_config(directory, (CONFIGS | REDUCED | SPREAD)[name])
    headers: list[dict[str, Any]] = [{}]
    end = 0
    for tensor, shape in promised(ModelConfig.read(directory)):
        if end > _SHARD_BYTES:
            headers.append({})
            end = 0
        start, end = end, end + 2 * math.prod(shape)
        headers[-1][tensor] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    files = {f"model-{n}.safetensors": header for n, header in enumerate(headers)}
    for path, header in files.items():
        text = json.dumps(header).encode()
        with (directory / path).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + max(one["data_offsets"][1] for one in header.values()))
    weight_map = {tensor: path for path, header in files.items() for tensor in header}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def meta_decoder(directory: Path) -> Decoder:
    return cast(Decoder, load(directory, torch.bfloat16, META))
