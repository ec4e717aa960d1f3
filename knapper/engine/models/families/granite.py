"""Granite 3, dense: Llama with multipliers of embeddings, layers, scores and logits (muP, arXiv 2203.03466)."""

from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, Multiplier

ARCHITECTURES: Final = (
    Architecture(
        "granite",
        "Granite 3, dense",
        attention_scale=Multiplier("attention_multiplier"),
        residual=Multiplier("residual_multiplier"),
        embedding=Multiplier("embedding_multiplier"),
        logits=Multiplier("logits_scaling"),
        refused=OPTIONS,
    ),
)
