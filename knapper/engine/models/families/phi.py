"""Phi-3, arXiv 2404.14219, and Phi-4, arXiv 2412.08905: Llama with fused linears, part of a head rotated, LongRoPE."""

from typing import Final

from knapper.engine.models.architecture import Architecture, Windows
from knapper.engine.models.mixture_rule import every_layer, never
from knapper.engine.models.rotary import RopeRule

ARCHITECTURES: Final = (
    Architecture(
        "phi3",
        "Phi-3, Phi-3.5, Phi-4 and Phi-4-mini",
        qkv_bias=never,
        output_bias=never,
        fused_qkv=True,
        fused_gate_up=True,
        windows=Windows(every_layer, listed=False),
        rope=RopeRule(partial=1.0, scalings=("longrope", "su")),
        rms_eps=1e-5,
    ),
)
