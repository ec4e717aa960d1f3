"""The process of a rank: `python -m knapper.engine.ranks.worker PARENT MEETING RANK SIZE DTYPE THREADS`."""

import os
import signal
import sys
from pathlib import Path

import structlog
import torch

from knapper.concurrency.parent import die_with
from knapper.engine import host_memory
from knapper.engine.hardware import device_of_rank
from knapper.engine.layers.batch_invariance import Exactness
from knapper.engine.models.preflight import expect_devices
from knapper.engine.ranks import signs
from knapper.engine.ranks.follower import RankWorker
from knapper.engine.ranks.group import Group
from knapper.engine.ranks.model import described, load_shards
from knapper.errors import KnapperError
from knapper.observability import logs
from knapper.settings import Settings

log = structlog.get_logger()


def main(parent: int, meeting: Path, rank: int, size: int, dtype: torch.dtype, threads: int) -> None:
    die_with(parent)
    settings = Settings.load(os.environ)
    logs.begin(f"rank {rank}", settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends it
    try:
        expect_devices(settings)
        device = device_of_rank(settings.device, rank, settings.gpu_memory_share)
        torch.set_num_threads(threads)
        if device.type == "cpu":
            host_memory.keep_freed()
        signs.write(meeting, rank, signs.READY)
        group = Group.join(meeting / "group", rank, size, device)
        exactness = Exactness(promised=settings.batch_invariant != "false")
        model, shards = load_shards(settings, dtype, group, exactness)
    except KnapperError as error:
        signs.write(meeting, rank, signs.FAILED, f"cannot load: {error}")
        sys.exit(1)
    signs.write(meeting, rank, signs.LOADED, described(exactness))
    log.info("loaded", device=str(device), shards=size)
    RankWorker(group, shards, model).obey()


if __name__ == "__main__":
    _, parent, meeting, rank, size, dtype, threads = sys.argv
    main(int(parent), Path(meeting), int(rank), int(size), getattr(torch, dtype), int(threads))
