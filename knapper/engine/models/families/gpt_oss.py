"""gpt-oss, arXiv 2508.10925: sinks in every attention, windows in every second layer, biases, and clamped experts.

Gate and up of an expert are one linear. Published files have experts in four bits (`models.packed`).
"""

from pathlib import Path
from typing import Final

from knapper.engine.models.architecture import Architecture, Windows, by_default
from knapper.engine.models.fields import Raw, number
from knapper.engine.models.mixture_rule import MixtureRule, always
from knapper.engine.models.mlp import ClampedSwish, MixtureNames
from knapper.engine.models.rotary import RopeRule

EXPERTS: Final = MixtureNames(
    router="mlp.router", joined=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"), whole=True
)
CLAMPED: Final = ClampedSwish(1.702, 7.0)


def _every_second(raw: Raw, index: int) -> bool:  # noqa: ARG001  one of the rules for layers
    return index % 2 == 0


def _clamped(raw: Raw, path: Path) -> ClampedSwish:
    return ClampedSwish(
        number(raw, "swiglu_alpha", path, CLAMPED.alpha), number(raw, "swiglu_limit", path, CLAMPED.limit)
    )


ARCHITECTURES: Final = (
    Architecture(
        "gpt_oss",
        "gpt-oss 20B and 120B",
        qkv_bias=by_default,
        output_bias=by_default,
        sinks=True,
        windows=Windows(_every_second, size=128),
        rope=RopeRule(theta=150000.0),
        mixture=MixtureRule(always, biased=True, width="intermediate_size", names=EXPERTS, activation=_clamped),
        head_dim=64,
        rms_eps=1e-5,
    ),
)
