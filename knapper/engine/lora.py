"""A LoRA adapter: which linears it touches, where its numbers lie, and how it begins.

R rank.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Lora:
    """What a forward pass reads, by site: y += scale * (x @ a.T) @ b.T.

    `a`: (R, in), `b`: (out, R), float32. Sites are named `layers.{i}.{q|k|v|o|gate|up|down}_proj` and `lm_head`; a site that is missing is not adapted.
    """

    a: dict[str, Tensor]
    b: dict[str, Tensor]
    scale: float
