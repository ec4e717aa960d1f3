"""The workers of train_step and sample for jobs, made once per process."""

import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from knapper.catalogue.tokenizer import Language
from knapper.errors import Unservable
from knapper.events.cloudevents import Event
from knapper.jobs import pause
from knapper.jobs.activity import Function
from knapper.jobs.job_files import Folders
from knapper.jobs.names import Start
from knapper.jobs.rollouts import RolloutSampler
from knapper.jobs.run_client import Journal
from knapper.jobs.runner import Training
from knapper.jobs.services import JobServices, open_job_services
from knapper.jobs.spec import KINDS, Kind
from knapper.jobs.worker import Worker
from knapper.serving import gates
from knapper.serving.sampler import Served, served
from knapper.settings import Settings
from knapper.store.counted import CountedStore
from knapper.store.factory import open_store

if TYPE_CHECKING:
    from knapper.serving.engine import ServingEngine


async def train(event: Event) -> None:
    """Handle an event for train_step. Raises Unservable, after noting it in the job's status."""
    await _handle(training, event)


async def sample(event: Event) -> None:
    """Handle an event for sample. Raises Unservable, after noting it in the job's status."""
    await _handle(sampling, event)


async def _handle(make_worker: Callable[[], Training | RolloutSampler], event: Event) -> None:
    try:
        worker = make_worker()
    except Unservable as error:
        await pause.note(job_services(), Start.parse(event.subject), str(error))
        raise
    await worker.answer(event)


@cache
def job_services() -> JobServices:
    """Needs no engine."""
    settings = Settings.load(os.environ)
    return open_job_services(settings, CountedStore(open_store(settings)), time.time)


@cache
def sampling() -> RolloutSampler:
    sampler = served()
    return RolloutSampler(
        _worker("sample", sampler, ["rl"]), sampler.sampler, _language(sampler.directory), sampler.context,
        sampler.sampled_by,
    )  # fmt: skip


@cache
def training() -> Training:
    engine = gates.engine().value()
    journal = Journal(engine.job_services.store, engine.runs, engine.job_services.clock)
    return Training(_worker("train_step", engine, KINDS), journal, _language(engine.directory), engine.context)


def _worker(function: Function, engine: "ServingEngine | Served", kinds: Sequence[Kind]) -> Worker:
    services = engine.job_services
    return Worker(function, services, _folders(services), kinds, engine.base_model, directory=str(engine.directory))


@cache
def _folders(services: JobServices) -> Folders:
    """Shared, so that both functions of a process read a job once."""
    return Folders(services.store)


@cache
def _language(directory: Path) -> Language:
    return Language.read(directory)
