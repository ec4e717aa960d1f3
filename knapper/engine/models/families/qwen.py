"""Qwen 2, arXiv 2407.10671 (biases on q, k and v), and dense Qwen 3, arXiv 2505.09388 (norms of q and k)."""

from typing import Final

from knapper.engine.models.architecture import Architecture, always, never

ARCHITECTURES: Final = (
    Architecture("qwen2", "Qwen 2 and 2.5", qkv_bias=always, output_bias=never),
    Architecture("qwen3", "Qwen 3, dense", qk_norm=True),
)
