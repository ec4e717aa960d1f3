"""Qwen 2, arXiv 2407.10671 (biases on q, k and v), and dense Qwen 3, arXiv 2505.09388 (norms of q and k)."""

from typing import Final

from knapper.engine.models.architecture import Architecture, Windows, always, never
from knapper.engine.models.fields import Raw


def _after_the_full_ones(raw: Raw, index: int) -> bool:
    return index >= int(raw.get("max_window_layers", 28))


_WINDOWS: Final = Windows(_after_the_full_ones, switched=True, size=4096)

ARCHITECTURES: Final = (
    Architecture("qwen2", "Qwen 2 and 2.5", qkv_bias=always, output_bias=never, windows=_WINDOWS),
    Architecture("qwen3", "Qwen 3, dense", qk_norm="head", windows=_WINDOWS, head_dim=128),
)
