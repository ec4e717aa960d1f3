"""Gemma, arXiv 2403.08295; Gemma 2, arXiv 2408.00118; the text models of Gemma 3, arXiv 2503.19786."""

from pathlib import Path
from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, NormRule, Windows, bidirectional
from knapper.engine.models.composite import Composite
from knapper.engine.models.fields import Raw, number, size
from knapper.engine.models.layer import Norms
from knapper.engine.models.rotary import RopeRule


def _root_of_hidden(raw: Raw, path: Path) -> float:
    return float(size(raw, "hidden_size", path) ** 0.5)


def _attention_scale(raw: Raw, path: Path) -> float:
    return float(number(raw, "query_pre_attn_scalar", path, 256.0) ** -0.5)


def _every_other(raw: Raw, index: int) -> bool:  # noqa: ARG001  a rule for layers
    return index % 2 == 0


def _all_but_each_sixth(raw: Raw, index: int) -> bool:
    return (index + 1) % int(raw.get("sliding_window_pattern", 6)) != 0


_NORM: Final = NormRule(wide=True, offset=1.0)
BOTH_SIDES: Final = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)
_REFUSED: Final = (*OPTIONS, bidirectional)

ARCHITECTURES: Final = (
    Architecture(
        "gemma",
        "Gemma 1 and CodeGemma",
        norm=_NORM,
        activation="gelu_pytorch_tanh",
        gelu="gelu_pytorch_tanh",  # which the first releases meant by it
        embedding=_root_of_hidden,
        refused=_REFUSED,
        head_dim=256,
        tied=True,
    ),
    Architecture(
        "gemma2",
        "Gemma 2",
        norms=BOTH_SIDES,
        norm=_NORM,
        windows=Windows(_every_other, size=4096),
        activation="gelu_pytorch_tanh",
        activation_field="hidden_activation",
        attention_scale=_attention_scale,
        caps=True,
        attention_cap=50.0,
        logits_cap=30.0,
        embedding=_root_of_hidden,
        refused=_REFUSED,
        head_dim=256,
        tied=True,
    ),
    Architecture(
        "gemma3_text",
        "Gemma 3 1B, and the text part of the others",
        qk_norm="head",
        norms=BOTH_SIDES,
        norm=_NORM,
        windows=Windows(_all_but_each_sixth, size=4096),
        rope=RopeRule(theta=1000000.0, local_theta=10000.0),
        activation="gelu_pytorch_tanh",
        activation_field="hidden_activation",
        attention_scale=_attention_scale,
        caps=True,
        embedding=_root_of_hidden,
        refused=_REFUSED,
        head_dim=256,
        tied=True,
    ),
)

COMPOSITES: Final = (
    Composite(
        "gemma3",
        "Gemma 3 4B, 12B and 27B, MedGemma 4B and 27B",
        {"gemma3_text": "gemma3_text", None: "gemma3_text"},
        {  # the published ones leave most of these out
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "eos_token_id": 1,
        },
    ),
)
