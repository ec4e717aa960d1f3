"""What a family's file states of an architecture: how it differs from plain Llama.

Facts about config.json and the layers; their source is transformers' `modeling_<model_type>.py`. An architecture with a
formula of its own (another norm, activation or mask) first needs that code in `decoder` or `engine.layers`, and a field
here that turns it on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Raw = Mapping[str, Any]  # config.json
Option = Callable[[Raw], str]  # the part that the decoder does not compute, for the error message; empty if none
Bias = Callable[[Raw], bool]
Layers = Callable[[Raw], frozenset[int]]


def never(raw: Raw) -> bool:  # noqa: ARG001  one of the rules for a bias
    return False


def always(raw: Raw) -> bool:  # noqa: ARG001  one of the rules for a bias
    return True


def by_option(raw: Raw) -> bool:
    return bool(raw.get("attention_bias", False))


def no_layer(raw: Raw) -> frozenset[int]:  # noqa: ARG001  one of the rules for layers
    return frozenset()


def activation(raw: Raw) -> str:
    name = raw.get("hidden_act", "silu")
    return "" if name in ("silu", "swish") else f"hidden_act {name!r} (only silu)"


def mlp_bias(raw: Raw) -> str:
    return "mlp_bias" if raw.get("mlp_bias", False) else ""


def quantization(raw: Raw) -> str:
    return "" if raw.get("quantization_config") is None else "quantized weights (quantization_config)"


def partial_rotary(raw: Raw) -> str:
    return "" if raw.get("partial_rotary_factor", 1.0) == 1.0 else "partial_rotary_factor"


def window(raw: Raw) -> str:
    """Any window size in the config turns the window on."""
    size = raw.get("sliding_window")
    return "" if size is None else f"sliding_window {size} (only full attention)"


def switched_window(raw: Raw) -> str:
    """Only `use_sliding_window` turns the window on: Qwen's configs always have a size."""
    return window(raw) if raw.get("use_sliding_window", False) else ""


OPTIONS: Final[tuple[Option, ...]] = (activation, mlp_bias, quantization, partial_rotary)


@dataclass(frozen=True)
class Architecture:
    """One `model_type`. `models`: well-known ones, for docs/models.md. `qk_norm`: RMS norm of each query and key head
    before rotation. `qkv_bias`, `output_bias`: when q, k, v and o have biases. `window`: when attention would slide.
    `refused`: further options to check. `without_positions`: layers that do not rotate queries and keys. `rope_theta`,
    `tied`: what a config.json that is silent about them means.
    """

    model_type: str
    models: str
    qk_norm: bool = False
    qkv_bias: Bias = by_option
    output_bias: Bias = by_option
    window: Option = switched_window
    refused: tuple[Option, ...] = OPTIONS
    without_positions: Layers = no_layer
    rope_theta: float = 10000.0
    tied: bool = False

    def refusal(self, raw: Raw) -> str:
        """The first option of config.json that the decoder does not compute; empty if it computes all."""
        return next((reason for check in (self.window, *self.refused) if (reason := check(raw))), "")

    @property
    def described(self) -> str:
        """What it has beside plain Llama, for docs/models.md."""
        parts = [
            "norms of q and k by head" if self.qk_norm else "",
            "layers without positions" if self.without_positions is not no_layer else "",
            "biases on q, k and v" if self.qkv_bias is always else "",
            "biases on q, k, v and o by `attention_bias`" if self.output_bias is by_option else "",
        ]
        return "; ".join(part for part in parts if part) or "nothing"
