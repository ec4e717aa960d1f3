"""Models that are computed natively and small enough for a laptop, and whether this machine has the memory for each.

Memory is that of a whole process that trains and samples on a CPU: three times the weights, for the file, what forward
products take and what backward ones take, and what else a process holds. `python -m benchmarks.small_models` measured
it; docs/performance.md has its table.
"""

from dataclasses import dataclass
from typing import Final

from knapper.limits import MIB

_COPIES: Final = 3
_BESIDE: Final = 2048 * MIB
_SIZES: Final = {"float32": 4, "bfloat16": 2}  # bytes a number


@dataclass(frozen=True)
class SmallModel:
    """`weights`: how many numbers. `gated`: the hub gives it to those alone who accepted its licence there."""

    name: str
    weights: int
    gated: bool = False

    @property
    def download(self) -> int:
        """Bytes; all of them are published in bfloat16."""
        return 2 * self.weights

    def memory(self, dtype: str) -> int:
        """Bytes of a process that serves it in this dtype."""
        return _COPIES * _SIZES[dtype] * self.weights + _BESIDE

    def dtypes(self, available: int) -> list[str]:
        """Those for which so many bytes are enough."""
        return [dtype for dtype in _SIZES if self.memory(dtype) <= available]


SMALL_MODELS: Final = (
    SmallModel("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    SmallModel("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
    SmallModel("Qwen/Qwen3-0.6B", 596_049_920),
    SmallModel("google/gemma-3-1b-it", 999_885_952, gated=True),
    SmallModel("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, gated=True),
    SmallModel("HuggingFaceTB/SmolLM2-1.7B-Instruct", 1_711_376_384),
    SmallModel("Qwen/Qwen3-1.7B", 1_720_574_976),
)
