"""What a rank takes of its card: its shards, what every rank has whole, and the parts that are gathered at a time.

Loads no torch.distributed: the table of cards is made by it, and the account of an engine before its weights are read.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from knapper.engine.layers.layerwise import HEAD_PART
from knapper.engine.memory import ModelBytes
from knapper.engine.models.config import ModelConfig
from knapper.engine.models.linear_shape import Shape
from knapper.engine.models.weight_files import promised

# One is computed with. Of the next one there is, for a moment, what the ranks sent and the matrices that this is copied
# into (FSDP2's `foreach_all_gather_copy_out`); and the one behind it may be under way by then.
PARTS_GATHERED: Final = 4


def parts(config: ModelConfig, size: int = 2) -> Mapping[int, int]:
    """Bytes of each part, whole: the matrices of a layer, and the head's; `size` bytes a number."""
    found: Counter[int] = Counter()
    for name, shape in promised(config):
        if name.startswith("model.layers.") and _is_sharded(name, shape):
            found[int(name.split(".")[2])] += size * math.prod(shape)
    found[HEAD_PART] = size * config.vocab_size * config.hidden
    return found


def gathered(sizes: Mapping[int, int]) -> int:
    """The most that a rank has of parts that are whole or under way."""
    return sum(sorted(sizes.values())[-PARTS_GATHERED:])


def planned(config: ModelConfig, devices: int, size: int = 2) -> ModelBytes:
    """`ModelBytes.planned` of a rank of so many: its `weights` are what it keeps, and what it gathers."""
    whole, sizes = ModelBytes.planned(config, size), parts(config, size)
    if devices == 1:
        return whole
    head = sizes[HEAD_PART] if config.tied else 0  # a tied one lies in shards beside the embedding, which is whole
    sharded = sum(sizes.values())
    kept = whole.weights + head - sharded + sharded // devices
    return replace(whole, weights=kept + gathered(sizes))


def _is_sharded(name: str, shape: Shape) -> bool:
    """Matrices of linears, and tensors of all experts; not the taps of a convolution."""
    return len(shape) == (2 if name.endswith(".weight") else 3)
