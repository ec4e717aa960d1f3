"""Mistral, arXiv 2310.06825: Llama without biases. Any window size in its configuration turns the window on."""

from typing import Final

from knapper.engine.models.architecture import Architecture, never, window

ARCHITECTURES: Final = (
    Architecture("mistral", "Mistral 7B v0.2 and later", qkv_bias=never, output_bias=never, window=window),
)
