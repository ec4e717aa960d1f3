"""The sampler of this process: the engine's own, or vLLM, as its settings say."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from knapper.catalogue.servable import expect_files
from knapper.errors import InvalidField
from knapper.jobs.services import JobServices, open_job_services
from knapper.observability import metrics
from knapper.serving import gates
from knapper.serving.handover import handover
from knapper.settings import Settings
from knapper.store.counted import CountedStore
from knapper.store.factory import open_store
from knapper.wire.progress import TokenEvent
from knapper.wire.types import SampleOutput, SampleRequest


class SamplerProtocol(Protocol):
    """The interface of both; knapper.engine.sampling.sampler.EngineSampler documents it."""

    @property
    def active(self) -> int: ...

    async def sample(
        self, request: SampleRequest, listen: Callable[[TokenEvent], None] | None = None
    ) -> SampleOutput: ...


@dataclass(frozen=True)
class Served:
    """A sampler and its base model."""

    base_model: str
    directory: Path
    context: int
    sampler: SamplerProtocol
    job_services: JobServices
    sampled_by: str  # backend and dtype


def served() -> Served:
    """The sampler of the environment's settings, whose gate must be open already. Raises Unservable."""
    if gates.samples_by_vllm():
        return gates.vllm().value()
    engine = gates.engine().value()
    return Served(
        engine.base_model, engine.directory, engine.context, engine.sampler, engine.job_services, engine.sampled_by
    )


def by_vllm(settings: Settings) -> Served:
    """Start vLLM. Loads nothing of training. Raises UserError."""
    from knapper.vllm.factory import open_sampler

    if not settings.model_directory:
        raise InvalidField("KNAPPER_MODEL_DIRECTORY", "", "the directory of the base model's files")
    began = time.monotonic()
    expect_files(Path(settings.model_directory))
    store = CountedStore(open_store(settings))
    sampler, context, dtype = open_sampler(settings, store, os.environ, handover())
    handover().to(sampler.offer)
    metrics.stage("weights", time.monotonic() - began)
    job_services = open_job_services(settings, store, time.time)
    return Served(settings.model, Path(settings.model_directory), context, sampler, job_services, f"vllm {dtype}")
