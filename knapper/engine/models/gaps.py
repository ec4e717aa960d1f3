"""What the native code lacks of mixtures that people ask for, by model_type, so that their refusal says it.

The source is transformers' `modeling_<model_type>.py`, and the published config.json for how weights are stored.
"""

from collections.abc import Mapping
from typing import Final

_LATENT: Final = "latent attention (MLA)"

MISSING: Final[Mapping[str, str]] = {
    "deepseek_v3": f"{_LATENT} and weights in fp8",
    "deepseek_v4": "attention over compressed keys",
    "glm_moe_dsa": f"{_LATENT} over keys that an index chooses",
    "gpt_oss": "attention with sinks, experts with biases and clamped activations, and weights in mxfp4",
    "kimi_k2": f"{_LATENT}, and experts in four bits",
    "kimi_k25": f"{_LATENT}, and experts in four bits",
    "nemotron_h": "layers with a state (Mamba 2)",
    "qwen3_5_moe": "layers with a state (gated delta rule), and experts that are one tensor in the file",
    "qwen3_next": "layers with a state (gated delta rule)",
    "qwen3_vl_moe": "experts that are one tensor in the file",
}


def needs(model_type: object) -> str:
    """For an error message, behind the model's name; empty for one of which nothing is known here."""
    found = MISSING.get(str(model_type))
    return "" if found is None else f", which needs {found}"
