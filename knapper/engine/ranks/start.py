"""Rank 0 starts the others, and they load the model together."""

from collections.abc import Callable

import torch

from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.models.decoder import Decoder
from knapper.engine.ranks import signs
from knapper.engine.ranks.followers import Followers, Watch, ends_with
from knapper.engine.ranks.group import Group
from knapper.engine.ranks.leader import Leader
from knapper.engine.ranks.model import described, load_shards
from knapper.errors import UserError
from knapper.settings import Settings


def start(
    settings: Settings, dtype: torch.dtype, device: torch.device, exactness: Exactness, now: Callable[[], float]
) -> tuple[Decoder, Leader]:
    """The model, whose weights are gathered as it computes, and the other ranks. Torch's threads are set before.

    Called on a thread that lives as long as the process. Raises UserError if a rank cannot load its part.
    """
    followers = Followers(settings.devices, (str(dtype).removeprefix("torch."), str(torch.get_num_threads())))
    try:
        followers.until(signs.READY)
        group = Group.join(followers.meeting / "group", 0, settings.devices, device)
        model, shards = load_shards(settings, dtype, group, exactness)
        own = described(exactness)
        for rank, other in enumerate(followers.until(signs.LOADED), 1):
            if other != own:
                raise UserError(f"rank {rank} computes by other products than rank 0: {other}, not {own}")
    except BaseException:
        followers.kill()
        raise
    watch = Watch(followers, settings.rank_timeout_s, ends_with(followers), now)
    leader = Leader(group, shards, watch)
    model.gather = leader.gather
    return model, leader
