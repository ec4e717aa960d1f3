"""Qwen3-Next and Qwen3.5: three layers of the gated delta rule, arXiv 2412.06464, to one of gated attention.

In those with experts a linear of a row weights what the shared one gives.
"""

from dataclasses import replace
from pathlib import Path
from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, NormRule, RecurrentLayers
from knapper.engine.models.composite import Composite
from knapper.engine.models.families.qwen import dense, unreadable_layers
from knapper.engine.models.fields import Raw, UnsupportedModel, size
from knapper.engine.models.mixture_rule import MixtureRule, always, by_field
from knapper.engine.models.mlp import MixtureNames
from knapper.engine.models.recurrent import GatedDelta
from knapper.engine.models.rotary import FULL, RopeRule

_LINEAR: Final = "linear_attention"


def _kinds(raw: Raw, path: Path) -> list[str]:
    layers, kinds = size(raw, "num_hidden_layers", path), raw.get("layer_types")
    if kinds is None:
        interval = size(raw, "full_attention_interval", path, 4)
        kinds = [_LINEAR if (index + 1) % interval else FULL for index in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not {FULL} <= {*kinds} <= {FULL, _LINEAR}:
        raise UnsupportedModel(
            f"{path}: layer_types is {kinds!r}; expected {FULL} or {_LINEAR} for each layer, {FULL} at least once"
        )
    return kinds


def _mixer(raw: Raw, path: Path, index: int) -> GatedDelta | None:
    return None if _kinds(raw, path)[index] == FULL else _delta(raw, path, fused=False)


def _fused_mixer(raw: Raw, path: Path, index: int) -> GatedDelta | None:
    return None if _kinds(raw, path)[index] == FULL else _delta(raw, path, fused=True)


def _delta(raw: Raw, path: Path, *, fused: bool) -> GatedDelta:
    key_heads = size(raw, "linear_num_key_heads", path, 16)
    value_heads = size(raw, "linear_num_value_heads", path, 32)
    if value_heads % key_heads:
        raise UnsupportedModel(f"{path}: {value_heads} value heads do not divide over {key_heads} key heads")
    return GatedDelta(
        key_heads,
        value_heads,
        size(raw, "linear_key_head_dim", path, 128),
        size(raw, "linear_value_head_dim", path, 128),
        size(raw, "linear_conv_kernel_dim", path, 4),
        fused,
    )


def _other_gates(raw: Raw) -> str:
    """The activation is that of the delta rule's gates, too."""
    if raw.get("hidden_act", "silu") != "silu":
        return f"hidden_act {raw['hidden_act']!r} (only silu)"
    return "" if raw.get("attn_output_gate", True) else "attention without gates (attn_output_gate)"


def _dense(raw: Raw, index: int) -> bool:
    return raw.get("num_experts") == 0 or dense(raw, index)


def _by_norm_topk_prob(raw: Raw) -> bool:
    return bool(raw.get("norm_topk_prob", True))


_DESCRIBED: Final = "layers of the gated delta rule in place of most attention"
_NORM: Final = NormRule(wide=True, offset=1.0)
_ROPE: Final = RopeRule(partial=0.25)
_NAMES: Final = MixtureNames(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
_JOINED: Final = replace(_NAMES, joined=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
_SHARED: Final = by_field("shared_expert_intermediate_size")

ARCHITECTURES: Final = (
    Architecture(
        "qwen3_5_text",
        "the text part of Qwen 3.5 and its successors, dense",
        qk_norm="head",
        gated_attention=True,
        norm=_NORM,
        rope=_ROPE,
        recurrent=RecurrentLayers(_mixer, GatedDelta(1, 1, 1, 1, 1), _DESCRIBED),
        refused=(*OPTIONS, _other_gates),
        head_dim=256,
    ),
    Architecture(
        "qwen3_5_moe_text",
        "the text part of Qwen 3.5 and its successors, with experts",
        qk_norm="head",
        gated_attention=True,
        norm=_NORM,
        rope=_ROPE,
        recurrent=RecurrentLayers(_mixer, GatedDelta(1, 1, 1, 1, 1), _DESCRIBED),
        mixture=MixtureRule(always, shared=_SHARED, names=_JOINED),
        refused=(*OPTIONS, _other_gates),
        head_dim=256,
    ),
    Architecture(
        "qwen3_next",
        "Qwen3-Next 80B-A3B",
        qk_norm="head",
        gated_attention=True,
        norm=_NORM,
        rope=_ROPE,
        recurrent=RecurrentLayers(_fused_mixer, GatedDelta(1, 1, 1, 1, 1, fused=True), _DESCRIBED),
        mixture=MixtureRule(_by_norm_topk_prob, shared=_SHARED, dense=_dense, names=_NAMES),
        refused=(*OPTIONS, _other_gates, unreadable_layers),
        head_dim=256,
    ),
)

COMPOSITES: Final = (
    Composite(
        "qwen3_5",
        "Qwen 3.5 and its successors, dense: 0.8B, 2B, 4B, 9B, 27B",
        {"qwen3_5_text": "qwen3_5_text", None: "qwen3_5_text"},
    ),
    Composite(
        "qwen3_5_moe",
        "Qwen 3.5 and its successors with experts, as 35B-A3B",
        {"qwen3_5_moe_text": "qwen3_5_moe_text", None: "qwen3_5_moe_text"},
    ),
)
