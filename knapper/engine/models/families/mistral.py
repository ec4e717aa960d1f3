"""Mistral, arXiv 2310.06825: Llama without biases. Any window size in its configuration turns the window on."""

from typing import Final

from knapper.engine.models.architecture import Architecture, Windows, every_layer, never
from knapper.engine.models.composite import Composite

ARCHITECTURES: Final = (
    Architecture(
        "mistral",
        "Mistral 7B and NeMo",
        qkv_bias=never,
        output_bias=never,
        windows=Windows(every_layer, listed=False, size=4096),
    ),
)

COMPOSITES: Final = (Composite("mistral3", "Mistral Small 3.1", {"mistral": "mistral", None: "mistral"}),)
