"""DeepSeek-V3, arXiv 2412.19437: latent attention, and experts chosen by groups behind some dense layers.

Kimi K2, arXiv 2507.20534, is of the same layers under a name of its own. GLM-4.7-Flash has them with other sizes.
DeepSeek-V3.2, arXiv 2512.02556, and GLM-5 let an index choose the keys of a row, a fixed number: all of them, in a text
that is no longer.
"""

from dataclasses import replace
from pathlib import Path
from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, by_option
from knapper.engine.models.composite import Composite
from knapper.engine.models.fields import Raw, size
from knapper.engine.models.layer import LatentAttention, ScoreRule
from knapper.engine.models.mixture_rule import MixtureRule, by_count
from knapper.engine.models.mlp import MixtureNames
from knapper.engine.models.rotary import FULL, RopeRule, score_factor

_SPARSE: Final = "sparse"
_ROPE: Final = RopeRule(interleaved=True)


def _latent(raw: Raw, path: Path) -> LatentAttention:
    plain, turned = size(raw, "qk_nope_head_dim", path), size(raw, "qk_rope_head_dim", path)
    rule = replace(_ROPE, interleaved=bool(raw.get("rope_interleave", True)))
    return LatentAttention(
        heads=size(raw, "num_attention_heads", path),
        q_rank=None if raw.get("q_lora_rank") is None else size(raw, "q_lora_rank", path),
        kv_rank=size(raw, "kv_lora_rank", path),
        plain_dim=plain,
        rope_dim=turned,
        value_dim=size(raw, "v_head_dim", path),
        scores=ScoreRule((plain + turned) ** -0.5 * score_factor(raw, path)),
        rope=rule.read(raw, path, turned)[FULL],
        biased=by_option(raw),
    )


def _biased(raw: Raw) -> str:
    """Queries of the residual have none there, what keys and values come of has: the two are one product here."""
    biased = by_option(raw) and raw.get("q_lora_rank") is None
    return "attention_bias, and without q_lora_rank" if biased else ""


def _fewer_keys(raw: Raw) -> str:
    heads = raw.get("num_attention_heads")
    return "" if raw.get("num_key_value_heads", heads) in (None, heads) else "fewer key/value heads than heads"


def _first(raw: Raw, index: int) -> bool:
    return index < int(raw.get("first_k_dense_replace", 3))


def _listed(raw: Raw, index: int) -> bool:
    """GLM-4.7-Flash's, whose first layer is dense where config.json is silent."""
    kinds = raw.get("mlp_layer_types")
    return index == 0 if kinds is None else kinds[index] != _SPARSE


def _listed_or_first(raw: Raw, index: int) -> bool:
    return _first(raw, index) if raw.get("mlp_layer_types") is None else _listed(raw, index)


def _unreadable_layers(raw: Raw) -> str:
    """Before the layers are taken from it."""
    first, kinds = raw.get("first_k_dense_replace", 3), raw.get("mlp_layer_types")
    if not isinstance(first, int):
        return f"first_k_dense_replace {first!r} (only a number)"
    whole = kinds is None or (isinstance(kinds, list) and len(kinds) == raw.get("num_hidden_layers"))
    return "" if whole and {*(kinds or ())} <= {_SPARSE, "dense"} else f"mlp_layer_types {kinds!r} (dense or sparse)"


def _by_norm_topk_prob(raw: Raw) -> bool:
    return bool(raw.get("norm_topk_prob", True))


_INDEX: Final = "index_topk"
_INDEXER: Final = ("self_attn.indexer.",)
_REFUSED: Final = (*OPTIONS, _biased, _fewer_keys, _unreadable_layers)

ARCHITECTURES: Final = (
    Architecture(
        "deepseek_v3",
        "DeepSeek-V3, V3.1 and R1; Kimi K2 and K2 Thinking (`kimi_k2`)",
        latent=_latent,
        rope=_ROPE,
        mixture=MixtureRule(_by_norm_topk_prob, corrected=True, shared=by_count, dense=_first),
        refused=_REFUSED,
        also_named=("kimi_k2",),
    ),
    Architecture(
        "glm4_moe_lite",
        "GLM-4.7-Flash",
        latent=_latent,
        rope=_ROPE,
        mixture=MixtureRule(_by_norm_topk_prob, corrected=True, shared=by_count, dense=_listed),
        refused=_REFUSED,
        rms_eps=1e-5,
    ),
    Architecture(
        "deepseek_v32",
        "DeepSeek-V3.2",
        latent=_latent,
        rope=_ROPE,
        mixture=MixtureRule(_by_norm_topk_prob, corrected=True, shared=by_count, dense=_listed_or_first),
        indexed=_INDEX,
        unread=_INDEXER,
        refused=_REFUSED,
    ),
    Architecture(
        "glm_moe_dsa",
        "GLM-5, 5.1, 5.2 and 5.3",
        latent=_latent,
        rope=_ROPE,
        mixture=MixtureRule(_by_norm_topk_prob, corrected=True, shared=by_count, dense=_listed_or_first),
        indexed=_INDEX,
        unread=_INDEXER,
        refused=_REFUSED,
        rms_eps=1e-5,
    ),
)

COMPOSITES: Final = (
    Composite(
        "kimi_k25",
        "Kimi K2.5 and K2.6",
        {"kimi_k2": "deepseek_v3", "deepseek_v3": "deepseek_v3", None: "deepseek_v3"},
        experts=MixtureNames(joined=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),  # in PEFT's words
    ),
)
