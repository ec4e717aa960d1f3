"""Tiny random models, built where a test needs them: a model directory that transformers loads too."""

import json
from pathlib import Path
from typing import Final, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

Kind = Literal[
    "llama", "llama_wide", "llama_untied", "qwen3"
]  # wide: heads of 32, the least that vLLM computes on a CPU

hidden, layers, heads, kv_heads, inner, context = 64, 2, 4, 2, 128, 512
bos, eos = "<|begin|>", "<|end|>"
_merges: Final = [
    "t h",
    "th e",
    "i n",
    "a n",
    "an d",
    "Ġ the",
    "Ġ and",
    "Ġ a",
    "e r",
    "o n",
]  # Ġ is how ByteLevel writes a space


def tiny_model(directory: Path, *, seed: int = 0, kind: Kind = "llama", context: int = context) -> Path:
    """`directory`, now holding a model: 2 layers, hidden 64, 4 heads over 2, a byte-level BPE tokenizer.

    Weights are drawn from `seed`, large enough that attention and every layer matter to the logits.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    vocab_size, begin, end = tokenizer.get_vocab_size(), tokenizer.token_to_id(bos), tokenizer.token_to_id(eos)
    assert begin is not None
    assert end is not None
    _write(directory / "tokenizer_config.json", _tokenizer_config(context))
    _write(directory / "config.json", _config(kind, vocab_size, begin, end, context))
    _write(directory / "generation_config.json", {"eos_token_id": end})
    save_file(_weights(kind, vocab_size, seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _tokenizer() -> Tokenizer:
    """256 bytes, ten merges and two special tokens: every text has tokens, and many characters take several."""
    vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
    for merge in _merges:
        merged = merge.replace(" ", "")
        if merged not in vocabulary:
            vocabulary.append(merged)
    bpe = models.BPE(
        vocab={token: index for index, token in enumerate(vocabulary)},
        merges=[(left, right) for left, right in (merge.split(" ") for merge in _merges) if left in vocabulary],
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([bos, eos])
    return tokenizer


def _tokenizer_config(context: int) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "model_max_length": context,
    }


def _config(kind: Kind, vocab_size: int, begin: int, end: int, context: int) -> dict[str, object]:
    qwen3 = kind == "qwen3"
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLM"],
        "model_type": "qwen3" if qwen3 else "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        # Qwen 3's heads need not add up to the hidden size.
        "head_dim": 32 if kind in ("qwen3", "llama_wide") else hidden // heads,
        "intermediate_size": inner,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": kind in ("llama", "llama_wide"),
        "bos_token_id": begin,
        "eos_token_id": end,
        "torch_dtype": "float32",
    }


def _weights(kind: Kind, vocab_size: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    head_dim = 32 if kind in ("qwen3", "llama_wide") else hidden // heads

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def linear(outputs: int, inputs: int) -> Tensor:
        return normal(outputs, inputs, scale=1.5 * inputs**-0.5)

    def gain(size: int) -> Tensor:
        return 1.0 + normal(size, scale=0.1)

    tensors = {"model.embed_tokens.weight": normal(vocab_size, hidden, scale=0.3), "model.norm.weight": gain(hidden)}
    for index in range(layers):
        at = f"model.layers.{index}"
        tensors |= {
            f"{at}.input_layernorm.weight": gain(hidden),
            f"{at}.self_attn.q_proj.weight": linear(heads * head_dim, hidden),
            f"{at}.self_attn.k_proj.weight": linear(kv_heads * head_dim, hidden),
            f"{at}.self_attn.v_proj.weight": linear(kv_heads * head_dim, hidden),
            f"{at}.self_attn.o_proj.weight": linear(hidden, heads * head_dim),
            f"{at}.post_attention_layernorm.weight": gain(hidden),
            f"{at}.mlp.gate_proj.weight": linear(inner, hidden),
            f"{at}.mlp.up_proj.weight": linear(inner, hidden),
            f"{at}.mlp.down_proj.weight": linear(hidden, inner),
        }
        if kind == "qwen3":
            tensors[f"{at}.self_attn.q_norm.weight"] = gain(head_dim)
            tensors[f"{at}.self_attn.k_norm.weight"] = gain(head_dim)
    if kind not in ("llama", "llama_wide"):
        tensors["lm_head.weight"] = normal(vocab_size, hidden, scale=0.3)
    return tensors


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sentencepiece() -> Tokenizer:
    """As Llama 2's: spaces are marks, unknown characters become bytes, and the first space is dropped."""
    vocabulary = {
        "▁the": 0,
        "▁and": 1,
        "!": 2,
        "▁": 3,
        "t": 4,
        "h": 5,
        "e": 6,
        **{f"<0x{n:02X}>": 7 + n for n in range(256)},
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>")])
    return tokenizer
