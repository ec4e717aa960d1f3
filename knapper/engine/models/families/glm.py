"""GLM-4, arXiv 2406.12793: biases on q, k and v, half of a head rotated, in neighbouring pairs, gate and up fused.

The models of 2025 (`glm4`) have norms on both sides of attention and MLP. GLM-4.5, arXiv 2508.06471: Llama's norms,
halves of the rotated part as pairs, and experts chosen as DeepSeek-V3's, behind some dense layers.
"""

from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, by_default, by_option
from knapper.engine.models.fields import Raw
from knapper.engine.models.layer import Norms
from knapper.engine.models.mixture_rule import MixtureRule, by_count, never
from knapper.engine.models.rotary import RopeRule

_BOTH_SIDES: Final = Norms(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)
_ROPE: Final = RopeRule(partial=0.5, interleaved=True)
_EPS: Final = 1.5625e-07


def _first(raw: Raw, index: int) -> bool:
    return index < int(raw.get("first_k_dense_replace", 1))


def _unreadable_layers(raw: Raw) -> str:
    """Before the layers are taken from it."""
    first = raw.get("first_k_dense_replace", 1)
    return "" if isinstance(first, int) else f"first_k_dense_replace {first!r} (only a number)"


def _by_use_qk_norm(raw: Raw) -> bool:
    return bool(raw.get("use_qk_norm", False))


def _by_norm_topk_prob(raw: Raw) -> bool:
    return bool(raw.get("norm_topk_prob", True))


ARCHITECTURES: Final = (
    Architecture(
        "glm",
        "GLM-4 9B",
        qkv_bias=by_default,
        output_bias=never,
        fused_gate_up=True,
        rope=_ROPE,
        head_dim=128,
        rms_eps=_EPS,
    ),
    Architecture(
        "glm4",
        "GLM-4 9B and 32B of 2025 (0414)",
        qkv_bias=by_default,
        output_bias=never,
        fused_gate_up=True,
        norms=_BOTH_SIDES,
        rope=_ROPE,
        head_dim=128,
        rms_eps=_EPS,
    ),
    Architecture(
        "glm4_moe",
        "GLM-4.5, GLM-4.5-Air and GLM-4.6",
        qk_norm="head",
        qk_normed=_by_use_qk_norm,
        qkv_bias=by_option,
        output_bias=never,
        rope=RopeRule(partial=0.5),
        mixture=MixtureRule(_by_norm_topk_prob, corrected=True, shared=by_count, dense=_first),
        refused=(*OPTIONS, _unreadable_layers),
        rms_eps=1e-5,
    ),
)
