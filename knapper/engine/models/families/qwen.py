"""Qwen 2, arXiv 2407.10671 (biases on q, k and v), and Qwen 3, arXiv 2505.09388 (norms of q and k), dense and mixed."""

from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, Windows, by_norm_topk_prob
from knapper.engine.models.composite import Composite
from knapper.engine.models.fields import Raw
from knapper.engine.models.mixture_rule import MixtureRule, always, every_layer, never
from knapper.engine.models.mlp import MixtureNames


def _after_the_full_ones(raw: Raw, index: int) -> bool:
    return index >= int(raw.get("max_window_layers", 28))


def dense(raw: Raw, index: int) -> bool:
    return index in (raw.get("mlp_only_layers") or ()) or (index + 1) % raw.get("decoder_sparse_step", 1) != 0


def unreadable_layers(raw: Raw) -> str:
    """Before the layers are taken from it."""
    step, dense = raw.get("decoder_sparse_step", 1), raw.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        return f"mlp_only_layers {dense!r} (only a list of layers)"
    return "" if isinstance(step, int) and step > 0 else f"decoder_sparse_step {step!r} (only 1 or more)"


_WINDOWS: Final = Windows(_after_the_full_ones, switched=True, size=4096)

ARCHITECTURES: Final = (
    Architecture("qwen2", "Qwen 2 and 2.5", qkv_bias=always, output_bias=never, windows=_WINDOWS),
    Architecture("qwen3", "Qwen 3, dense", qk_norm="head", windows=_WINDOWS, head_dim=128),
    Architecture(
        "qwen3_moe",
        "Qwen 3 30B-A3B and 235B-A22B",
        qk_norm="head",
        windows=Windows(every_layer, listed=False, switched=True, size=4096),
        mixture=MixtureRule(by_norm_topk_prob, dense=dense),
        refused=(*OPTIONS, unreadable_layers),
    ),
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
        images=True,
    ),
    Composite(
        "qwen3_vl_moe",
        "Qwen 3 VL 30B-A3B and 235B-A22B",
        {"qwen3_vl_moe_text": "qwen3_moe", None: "qwen3_moe"},
        {"rope_theta": 500000.0, "norm_topk_prob": True},
        experts=MixtureNames(joined=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), turned=True),
    ),
)
