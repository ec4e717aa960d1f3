"""Tiny random models of other kinds than `tiny`, written by transformers; of them the native code knows SmolLM3."""

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
# Fused query, key and value; layers in parallel; a head that is its own; fused gate and up; windows; caps on attention
# and logits; norms elsewhere; biases everywhere, on the head too; a scaled head.
CONFIGS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "phi3": ("Phi3Config", _GROUPED),
    "gemma2": ("Gemma2Config", {**_GROUPED, "head_dim": 16, "sliding_window": 16, "final_logit_softcapping": 1.0}),
    "gemma3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 16, "sliding_window": 16}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "phi": ("PhiConfig", _SIZES),
    "smollm3": ("SmolLM3Config", {**_GROUPED, "no_rope_layer_interval": 2}),
    "granite": ("GraniteConfig", {**_GROUPED, "logits_scaling": 4.0}),
}


def strange_model(directory: Path, kind: str, *, seed: int = 0, **changes: Any) -> Path:
    """`directory`, now holding a model of another architecture with the tiny tokenizer."""
    tiny_model(directory)
    (directory / "model.safetensors").unlink()
    before = json.loads((directory / "config.json").read_text())
    ids = {name: before[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    class_name, values = CONFIGS[kind]
    config = getattr(transformers, class_name)(**{**values, **ids, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # the library has no types here
        for name, parameter in model.named_parameters():  # every layer matters, more than the token itself
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.08 if "embed" in name else 1.5 * 64**-0.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    return directory
