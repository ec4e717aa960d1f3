"""Llama, arXiv 2302.13971: the plain decoder from which the others differ."""

from typing import Final

from knapper.engine.models.architecture import Architecture

ARCHITECTURES: Final = (Architecture("llama", "Llama 2 and 3, SmolLM, SmolLM2"),)
