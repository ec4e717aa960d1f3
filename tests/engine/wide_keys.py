"""A model that computes little and keeps much: Qwen 3 of hidden size 64 with keys and values of any size."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.engine.tiny import hidden, inner, tiny_model


def wide_model(
    directory: Path, *, layers: int, kv_heads: int = 8, head_dim: int = 128, context: int = 40_960, ends: int = 1
) -> Path:
    """`directory`, now holding it. Of its 268 tokens the last `ends` end a text.

    Qwen3-0.6B has 28 layers, and the other sizes as here.
    """
    tiny_model(directory, kind="qwen3", context=context)
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    vocabulary = config["vocab_size"]
    stops = list(range(vocabulary - ends, vocabulary))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    generator = torch.Generator().manual_seed(0)

    def linear(outputs: int, inputs: int) -> torch.Tensor:
        return torch.randn(outputs, inputs, generator=generator).mul_(1.5 / math.sqrt(inputs))

    width = kv_heads * head_dim
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator) * 0.3,
        "model.norm.weight": torch.ones(hidden),
    }
    for index in range(layers):
        at = f"model.layers.{index}"
        for name, rows, columns in (
            ("self_attn.q_proj", width, hidden), ("self_attn.k_proj", width, hidden),
            ("self_attn.v_proj", width, hidden), ("self_attn.o_proj", hidden, width),
            ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden), ("mlp.down_proj", hidden, inner),
        ):  # fmt: skip
            tensors[f"{at}.{name}.weight"] = linear(rows, columns)
        for name, size in (
            ("input_layernorm", hidden), ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", head_dim), ("self_attn.k_norm", head_dim),
        ):  # fmt: skip
            tensors[f"{at}.{name}.weight"] = torch.ones(size)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
