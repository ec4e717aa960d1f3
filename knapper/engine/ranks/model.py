"""A rank's model: the native layers over shards of the weights."""

import json
import platform
from pathlib import Path

import torch

from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.models.decoder import Decoder
from knapper.engine.models.loader import load
from knapper.engine.ranks.group import Group
from knapper.engine.ranks.sharded_linear import ShardedLinear
from knapper.engine.ranks.shards import Shards
from knapper.settings import Settings


def load_shards(settings: Settings, dtype: torch.dtype, group: Group, exactness: Exactness) -> tuple[Decoder, Shards]:
    """Layer by layer, so that no rank ever has more than one whole. Raises UserError as `loader.load` does."""
    shards = Shards(group.mesh)
    directory = Path(settings.model_directory)
    model = load(directory, dtype, group.device, exactness, settings.context, linear=ShardedLinear, made=shards.add)
    assert isinstance(model, Decoder), "settings of another were refused"
    return model, shards


def described(exactness: Exactness) -> str:
    """What must be equal on all ranks for them to have the same bits."""
    return json.dumps([platform.machine(), torch.__version__, torch.get_num_threads(), exactness.layouts])
