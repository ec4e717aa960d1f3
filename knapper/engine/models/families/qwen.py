"""Qwen 2, arXiv 2407.10671 (biases on q, k and v), and dense Qwen 3, arXiv 2505.09388 (norms of q and k)."""

from typing import Final

from knapper.engine.models.architecture import Architecture, Windows, always, never
from knapper.engine.models.composite import Composite
from knapper.engine.models.fields import Raw


def _after_the_full_ones(raw: Raw, index: int) -> bool:
    return index >= int(raw.get("max_window_layers", 28))


_WINDOWS: Final = Windows(_after_the_full_ones, switched=True, size=4096)

ARCHITECTURES: Final = (
    Architecture("qwen2", "Qwen 2 and 2.5", qkv_bias=always, output_bias=never, windows=_WINDOWS),
    Architecture("qwen3", "Qwen 3, dense", qk_norm="head", windows=_WINDOWS, head_dim=128),
)

COMPOSITES: Final = (
    Composite(
        "qwen2_5_vl",
        "Qwen 2.5 VL",
        {"qwen2_5_vl_text": "qwen2", None: "qwen2"},
        {"rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "max_window_layers": 80},
        flat=True,
    ),
    Composite(
        "qwen3_vl",
        "Qwen 3 VL, dense",
        {"qwen3_vl_text": "qwen3", None: "qwen3"},
        {"rope_theta": 500000.0, "head_dim": 128},
    ),
)
