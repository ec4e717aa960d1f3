"""Mistral, arXiv 2310.06825: Llama without biases. Any window size in its configuration turns the window on.

Mixtral, arXiv 2401.04088: the same with experts.
"""

from typing import Final

from knapper.engine.models.architecture import Architecture, Windows
from knapper.engine.models.composite import Composite
from knapper.engine.models.mixture_rule import MixtureRule, always, every_layer, never
from knapper.engine.models.mlp import MixtureNames
from knapper.engine.models.rotary import RopeRule

_EXPERT: Final = "block_sparse_moe.experts.{}."
_NAMES: Final = MixtureNames("block_sparse_moe.gate", f"{_EXPERT}w1", f"{_EXPERT}w3", f"{_EXPERT}w2")

ARCHITECTURES: Final = (
    Architecture(
        "mistral",
        "Mistral 7B and NeMo",
        qkv_bias=never,
        output_bias=never,
        windows=Windows(every_layer, listed=False, size=4096),
    ),
    Architecture(
        "mixtral",
        "Mixtral 8x7B and 8x22B",
        qkv_bias=never,
        output_bias=never,
        windows=Windows(every_layer, listed=False),
        rope=RopeRule(theta=1000000.0),
        mixture=MixtureRule(always, width="intermediate_size", names=_NAMES),
        rms_eps=1e-5,
    ),
)

COMPOSITES: Final = (Composite("mistral3", "Mistral Small 3.1", {"mistral": "mistral", None: "mistral"}),)
