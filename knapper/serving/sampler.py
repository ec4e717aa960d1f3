"""The sampler of this process, whichever its settings name: the engine's own, or vLLM."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from knapper.catalogue.servable import expect_files
from knapper.errors import InvalidField
from knapper.jobs.services import JobServices, open_services
from knapper.observability import metrics
from knapper.serving import gates
from knapper.settings import Settings
from knapper.store.counted import CountedStore
from knapper.store.factory import open_store
from knapper.wire.progress import TokenEvent
from knapper.wire.types import SampleOutput, SampleRequest


class SamplerProtocol(Protocol):
    """What both are: knapper.engine.sampling.sampler.EngineSampler says what is promised."""

    @property
    def active(self) -> int: ...

    async def sample(
        self, request: SampleRequest, listen: Callable[[TokenEvent], None] | None = None
    ) -> SampleOutput: ...


@dataclass(frozen=True)
class Served:
    """What the sample function needs to answer."""

    base_model: str
    directory: Path
    context: int
    sampler: SamplerProtocol
    place: JobServices  # of jobs


def served() -> Served:
    """What samples. Raises Unservable. Everything comes from the environment.

    The gate was opened before: see knapper.serving.gates.
    """
    if Settings.load(os.environ).sampler == "vllm":
        return gates.vllm().value()
    own = gates.engine().value()
    return Served(own.base_model, own.directory, own.context, own.sampler, own.place)


def by_vllm(settings: Settings) -> Served:
    """A process that only samples loads nothing of training. Raises UserError."""
    from knapper.vllm.factory import open_sampler

    if not settings.model_directory:
        raise InvalidField("KNAPPER_MODEL_DIRECTORY", "", "the directory of the base model's files")
    began = time.monotonic()
    expect_files(Path(settings.model_directory))
    store = CountedStore(open_store(settings))
    sampler, context = open_sampler(settings, store, os.environ)
    metrics.cold_start_seconds.labels("weights").observe(time.monotonic() - began)
    place = open_services(settings, store, time.time)
    return Served(settings.model, Path(settings.model_directory), context, sampler, place)
