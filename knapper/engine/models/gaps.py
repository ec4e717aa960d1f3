"""What the native code lacks of models that people ask for, by model_type, so that their refusal says it.

The source is transformers' `modeling_<model_type>.py`, and the published config.json for how weights are stored.
"""

from collections.abc import Mapping
from typing import Final

_LATENT: Final = "latent attention (MLA)"
_FUSED: Final = "experts that are one tensor in the file"

MISSING: Final[Mapping[str, str]] = {
    "deepseek_v3": f"{_LATENT} and weights in fp8",
    "deepseek_v4": "attention over compressed keys",
    "glm_moe_dsa": f"{_LATENT} over keys that an index chooses",
    "kimi_k2": f"{_LATENT}, and experts in four bits",
    "kimi_k25": f"{_LATENT}, and experts in four bits",
    "lfm2_moe": "experts in place of MLPs, beside its convolutions",
    "nemotron_h": "layers with a state (Mamba 2), and experts in place of MLPs",
    "qwen3_vl_moe": _FUSED,
}
