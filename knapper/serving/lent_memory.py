"""Training's part of a card while the vLLM beside it sleeps: the sleeper's part too, until it wakes.

More layers keep their activations then, and are not computed again in the backward pass. The bits stay
(knapper.engine.layers.checkpointing), and so do the rows of a pass: those decide what fits at all.
"""

from dataclasses import replace
from typing import Final

import structlog
import torch

from knapper.engine.executor import Executor, Work
from knapper.engine.hardware import release, take_memory
from knapper.engine.models.base import Model
from knapper.engine.models.decoder import Decoder
from knapper.engine.training.scheduler import TrainingScheduler
from knapper.serving.handover import handover
from knapper.settings import Settings

_LENT: Final = 0.85  # of a sleeping vLLM's part of a card: it keeps what CUDA and its graphs take

log = structlog.get_logger()


def borrow(settings: Settings, executor: Executor, scheduler: TrainingScheduler, model: Model) -> None:
    """Have the memory of the vLLM of this process, on the same card, while it sleeps; nothing where there is none."""
    if model.device.type == "cuda" and settings.sampler == "vllm" and isinstance(model, Decoder):
        lent = _LENT * settings.vllm_memory
        lent_bytes = int(lent * torch.cuda.get_device_properties(model.device).total_memory)
        share = settings.gpu_memory_share
        handover().lends_to(LentMemory(executor, scheduler, model, share, lent, lent_bytes))


class LentMemory:
    """`share`: training's part of the card, `lent`: what it has more meanwhile, both of 1; `lent_bytes`: the same."""

    def __init__(
        self, executor: Executor, scheduler: TrainingScheduler, decoder: Decoder, share: float, lent: float,
        lent_bytes: int,
    ) -> None:  # fmt: skip
        self._executor, self._scheduler, self._decoder = executor, scheduler, decoder
        self._share, self._lent, self._own = share, lent, decoder.passes
        self._more = replace(decoder.passes, total=decoder.passes.total + lent_bytes)

    async def lend(self) -> None:
        """From the next pass on."""
        await self._executor.run(self._extend(), "handover")

    async def reclaim(self) -> None:
        """Returns once the pass under way has ended, and torch has given back what it does not use."""
        await self._executor.run(self._shrink(), "handover")

    def _extend(self) -> Work[None]:
        yield from ()
        take_memory(self._decoder.device, self._share + self._lent)
        self._decoder.passes = self._more
        log.info("training has the memory of vLLM, which sleeps", activations_mib=self._more.total >> 20)

    def _shrink(self) -> Work[None]:
        self._decoder.passes = self._own
        while self._scheduler.computing:
            yield
        release(self._decoder.device)
        take_memory(self._decoder.device, self._share)
