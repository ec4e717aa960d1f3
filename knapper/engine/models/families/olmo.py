"""OLMo 2, arXiv 2501.00656, and OLMo 3: norms after attention and MLP, and over all queries and all keys; windows.

OLMoE, arXiv 2409.02060: experts, between the norms of Llama.
"""

from typing import Final

from knapper.engine.models.architecture import OPTIONS, Architecture, NormRule, Windows, by_norm_topk_prob
from knapper.engine.models.fields import Raw
from knapper.engine.models.layer import Norms
from knapper.engine.models.mixture_rule import MixtureRule
from knapper.engine.models.rotary import RopeRule


def _all_but_each_fourth(raw: Raw, index: int) -> bool:  # noqa: ARG001  a rule for layers
    return (index + 1) % 4 != 0


def _clips(raw: Raw) -> str:
    return "" if raw.get("clip_qkv") is None else "clip_qkv"


_AFTER: Final = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_NORM: Final = NormRule(wide=True)

ARCHITECTURES: Final = (
    Architecture("olmo2", "OLMo 2", qk_norm="width", norms=_AFTER, norm=_NORM, rms_eps=1e-5),
    Architecture(
        "olmo3",
        "OLMo 3",
        qk_norm="width",
        norms=_AFTER,
        norm=_NORM,
        windows=Windows(_all_but_each_fourth, size=4096),
        rope=RopeRule(theta=500000.0, local_theta=500000.0),
        rms_eps=1e-5,
    ),
    Architecture(
        "olmoe",
        "OLMoE 1B-7B",
        qk_norm="width",
        mixture=MixtureRule(by_norm_topk_prob, width="intermediate_size"),
        refused=(*OPTIONS, _clips),
        rms_eps=1e-5,
    ),
)
