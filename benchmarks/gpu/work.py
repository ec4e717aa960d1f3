"""The floating-point operations that training asks for, and the peaks that they are compared with."""

from collections.abc import Sequence
from typing import Final

from knapper.engine.models.config import ModelConfig

# Dense bfloat16, by the vendor's datasheets, in TFLOP/s; the first name that a card's own contains.
PEAKS: Final = (
    ("H100 PCIe", 756.0), ("H100", 989.0), ("H200", 989.0), ("A100", 312.0), ("L40S", 362.0), ("L4", 121.0),
    ("B200", 2250.0),
)  # fmt: skip


def peak_of(card: str) -> float | None:
    return next((tflops for name, tflops in PEAKS if name in card), None)


def training_flops(config: ModelConfig, lengths: Sequence[int], rank: int) -> float:
    """Of one forward and backward of LoRA: what is computed again is not counted.

    Frozen matrices have two products (forward, and the gradient of their input), adapters three, attention three times
    its forward one, half of it masked.
    """
    targets = config.lora_targets
    frozen = 4 * sum(target.inputs * target.outputs for target in targets)
    adapters = 6 * rank * sum(target.inputs + target.outputs for target in targets[:-1])
    attended = sum(length * (length + 1) / 2 for length in lengths)
    attention = 12 * attended * sum(mixer.q_width for mixer in config.attention)
    return (frozen + adapters) * sum(lengths) + attention
