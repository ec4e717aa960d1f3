"""GLM-4, arXiv 2406.12793: biases on q, k and v, half of a head rotated, in neighbouring pairs, gate and up fused.

The models of 2025 (`glm4`) have norms on both sides of attention and MLP.
"""

from typing import Final

from knapper.engine.models.architecture import Architecture, by_default, never
from knapper.engine.models.layer import Norms
from knapper.engine.models.rotary import RopeRule

_BOTH_SIDES: Final = Norms(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)
_ROPE: Final = RopeRule(partial=0.5, interleaved=True)
_EPS: Final = 1.5625e-07

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
)
