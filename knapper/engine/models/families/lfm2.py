"""LFM2, arXiv 2511.23404: short convolutions, gated on both sides, and a few layers of attention.

LFM2-MoE has experts behind some dense layers, chosen by sigmoids with a frozen correction.
"""

from pathlib import Path
from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, Names, RecurrentLayers
from knapper.engine.models.fields import Raw, UnsupportedModel, listed, number, size
from knapper.engine.models.layer import Norms
from knapper.engine.models.mixture_rule import MixtureRule, never
from knapper.engine.models.mlp import MixtureNames
from knapper.engine.models.recurrent import ShortConvolution
from knapper.engine.models.rotary import FULL, RopeRule

_CONVOLUTION: Final = "conv"


def _mixer(raw: Raw, path: Path, index: int) -> ShortConvolution | None:
    if _kinds(raw, path)[index] == FULL:
        return None
    return ShortConvolution(
        size(raw, "hidden_size", path), size(raw, "conv_L_cache", path, 3), bool(raw.get("conv_bias", False))
    )


def _kinds(raw: Raw, path: Path) -> list[str]:
    """Of each layer; the first releases list the numbers of those with attention."""
    layers, kinds = size(raw, "num_hidden_layers", path), raw.get("layer_types")
    if kinds is None:
        attentive = range(layers) if raw.get("full_attn_idxs") is None else listed(raw["full_attn_idxs"])
        kinds = [FULL if index in attentive else _CONVOLUTION for index in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or not {FULL} <= {*kinds} <= {FULL, _CONVOLUTION}:
        raise UnsupportedModel(
            f"{path}: layer_types is {kinds!r}; expected {FULL} or {_CONVOLUTION} for each layer, {FULL} at least once"
        )
    return kinds


def _mlp_width(raw: Raw, path: Path) -> int:
    """What config.json says, or with adjustment two thirds of it, times a factor, up to a whole multiple."""
    width = size(raw, "block_ff_dim", path, size(raw, "intermediate_size", path, 12288))
    if not raw.get("block_auto_adjust_ff_dim", True):
        return width
    multiple = size(raw, "block_multiple_of", path, 256)
    width = int(number(raw, "block_ffn_dim_multiplier", path, 1.0) * int(2 * width / 3))
    return width + -width % multiple


def _ties(raw: Raw, default: bool) -> bool:
    return bool(raw.get("tie_embedding", raw.get("tie_word_embeddings", default)))


def _by_norm_topk_prob(raw: Raw) -> bool:
    return bool(raw.get("norm_topk_prob", True))


def _first(raw: Raw, index: int) -> bool:
    return index < int(raw.get("num_dense_layers", 2))


def _unreadable_layers(raw: Raw) -> str:
    """Before the layers are taken from it."""
    first = raw.get("num_dense_layers", 2)
    return "" if isinstance(first, int) else f"num_dense_layers {first!r} (only a number)"


def _uncorrected(raw: Raw) -> str:
    return "" if raw.get("use_expert_bias", True) else "experts chosen without a correction (use_expert_bias)"


_NORMS: Final = Norms("operator_norm", None, "ffn_norm", None)
_ROPE: Final = RopeRule(theta=1000000.0)
_RECURRENT: Final = RecurrentLayers(_mixer, ShortConvolution(1, 1), "short convolutions in place of most attention")
_NAMES: Final = Names(
    output="out_proj",
    qk_norms=("q_layernorm", "k_layernorm"),
    mlp=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
    final_norm="model.embedding_norm",
    eps_field="norm_eps",
)
_EXPERTS: Final = MixtureNames(
    router="feed_forward.gate",
    gate="feed_forward.experts.{}.w1",
    up="feed_forward.experts.{}.w3",
    down="feed_forward.experts.{}.w2",
    correction="feed_forward.expert_bias",
    joined=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
)

ARCHITECTURES: Final = (
    Architecture(
        "lfm2",
        "LFM2 350M, 700M, 1.2B and 2.6B",
        qk_norm="head",
        qkv_bias=never,
        output_bias=never,
        norms=_NORMS,
        rope=_ROPE,
        recurrent=_RECURRENT,
        mlp_width=_mlp_width,
        ties_by=_ties,
        names=_NAMES,
        refused=OPTIONS,
        rms_eps=1e-5,
        tied=True,
    ),
    Architecture(
        "lfm2_moe",
        "LFM2 8B-A1B and 24B-A2B",
        qk_norm="head",
        qkv_bias=never,
        output_bias=never,
        norms=_NORMS,
        rope=_ROPE,
        recurrent=_RECURRENT,
        mixture=MixtureRule(_by_norm_topk_prob, corrected=True, floor=1e-6, dense=_first, names=_EXPERTS),
        ties_by=_ties,
        names=_NAMES,
        refused=(*OPTIONS, _unreadable_layers, _uncorrected),
        rms_eps=1e-5,
        tied=True,
    ),
)
