"""Nemotron 3, arXiv 2512.20856: Mamba 2, a little attention without positions, and experts, each a layer by itself.

Of Super and Ultra the experts compute in fewer numbers (arXiv 2601.18089). MLPs have no gates.
"""

from pathlib import Path
from typing import Final

from knapper import limits
from knapper.engine.models.architecture import (
    OPTIONS,
    Architecture,
    Names,
    NormRule,
    Part,
    RecurrentLayers,
)
from knapper.engine.models.fields import Raw, UnsupportedModel, number, size
from knapper.engine.models.layer import Norms
from knapper.engine.models.mixture_rule import MixtureRule, by_field, every_layer, never
from knapper.engine.models.mlp import MixtureNames
from knapper.engine.models.recurrent import Mamba2
from knapper.errors import UserError

_LIST, _PATTERN = "layers_block_type", "hybrid_override_pattern"
_KINDS: Final = {
    "M": "mamba", "mamba": "mamba", "linear_attention": "mamba", "*": "attention", "attention": "attention",
    "full_attention": "attention", "E": "moe", "moe": "moe", "-": "mlp", "mlp": "mlp",
}  # fmt: skip


def _kinds(raw: Raw, path: Path) -> list[str]:
    """Of each layer: a list of words, or as the first releases have it, a letter for each."""
    name = _LIST if raw.get(_LIST) is not None else _PATTERN
    kinds = raw.get(name)
    if isinstance(kinds, list | str) and len(kinds) > limits.model_layers_max:
        raise UserError(f"{path}: {name} has {len(kinds)} layers; allowed: at most {limits.model_layers_max}")
    known = isinstance(kinds, list | str) and all(isinstance(kind, str) and kind in _KINDS for kind in kinds)
    found = [_KINDS[kind] for kind in kinds] if kinds is not None and known else []
    if "attention" not in found:
        raise UnsupportedModel(
            f"{path}: {name} is {kinds!r}; expected for each layer one of {', '.join(_KINDS)}, and attention once"
        )
    return found


def _count(raw: Raw, path: Path) -> int:
    return len(_kinds(raw, path))


def _lone(raw: Raw, path: Path, index: int) -> Part:
    return "mixer" if _kinds(raw, path)[index] in ("mamba", "attention") else "mlp"


def _mixer(raw: Raw, path: Path, index: int) -> Mamba2 | None:
    if _kinds(raw, path)[index] == "attention":
        return None
    heads, groups = size(raw, "mamba_num_heads", path, 128), size(raw, "n_groups", path, 8)
    if heads % groups:
        raise UnsupportedModel(f"{path}: mamba_num_heads is {heads}, which n_groups {groups} does not divide")
    return Mamba2(
        heads,
        groups,
        size(raw, "mamba_head_dim", path, 64),
        size(raw, "ssm_state_size", path, 128),
        size(raw, "conv_kernel", path, 4),
        number(raw, "time_step_min", path, 0.001),
        biased=bool(raw.get("use_conv_bias", True)),
    )


def _dense(raw: Raw, index: int) -> bool:
    return _kinds(raw, Path("config.json"))[index] == "mlp"


def _by_norm_topk_prob(raw: Raw) -> bool:
    return bool(raw.get("norm_topk_prob", True))


def _other_mixers(raw: Raw) -> str:
    """What the layers of Mamba 2 may have, too."""
    if raw.get("mamba_hidden_act", "silu") != "silu":
        return f"mamba_hidden_act {raw['mamba_hidden_act']!r} (only silu)"
    return "biases of its linears (use_bias)" if raw.get("use_bias", False) else ""


_EXPERTS: Final = MixtureNames(
    router="mixer.gate",
    gate=None,
    up="mixer.experts.{}.up_proj",
    down="mixer.experts.{}.down_proj",
    correction="mixer.gate.e_score_correction_bias",
    shared="mixer.shared_experts",
    latent=("mixer.fc1_latent_proj", "mixer.fc2_latent_proj"),
    joined=("mixer.experts.up_proj", "mixer.experts.down_proj"),
)

ARCHITECTURES: Final = (
    Architecture(
        "nemotron_h",
        "Nemotron 3 Nano, Super and Ultra, Nemotron-H",
        qkv_bias=never,
        output_bias=never,
        norms=Norms("norm", None, "norm", None),
        norm=NormRule(wide=True),
        without_positions=every_layer,
        activation="relu2",
        activation_field="mlp_hidden_act",
        activations={"relu2": "relu2"},
        recurrent=RecurrentLayers(_mixer, Mamba2(1, 1, 1, 1, 1, 1.0), "layers of Mamba 2 in place of most attention"),
        mixture=MixtureRule(
            _by_norm_topk_prob,
            corrected=True,
            shared=by_field("moe_shared_expert_intermediate_size"),
            latent="moe_latent_size",
            dense=_dense,
            names=_EXPERTS,
        ),
        count=_count,
        lone=_lone,
        names=Names(
            attention="mixer",
            mlp=("mixer.up_proj", "mixer.down_proj"),
            final_norm="model.norm_f",
            eps_field="layer_norm_epsilon",
        ),
        refused=(*OPTIONS, _other_mixers),
        head_dim=128,
        rms_eps=1e-5,
    ),
)
