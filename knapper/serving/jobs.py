"""What the engines' functions do for jobs, made once a process."""

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
from knapper.jobs.services import JobServices, open_services
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
    """train_step's part of a job. Raises Unservable, of which the job then tells its user."""
    await _answer(training, event)


async def sample(event: Event) -> None:
    """sample's part, likewise."""
    await _answer(sampling, event)


async def _answer(part: Callable[[], Training | RolloutSampler], event: Event) -> None:
    try:
        worker = part()
    except Unservable as error:
        await pause.note(services(), Start.parse(event.subject), str(error))
        raise
    await worker.answer(event)


@cache
def services() -> JobServices:
    """Where the state lies, with or without an engine."""
    settings = Settings.load(os.environ)
    return open_services(settings, CountedStore(open_store(settings)), time.time)


@cache
def sampling() -> RolloutSampler:
    own = served()
    return RolloutSampler(_worker("sample", own, ["rl"]), own.sampler, _language(own.directory), own.context)


@cache
def training() -> Training:
    own = gates.engine().value()
    journal = Journal(own.place.store, own.residents, own.place.clock)
    return Training(_worker("train_step", own, KINDS), journal, _language(own.directory), own.context)


def _worker(function: Function, own: "ServingEngine | Served", kinds: Sequence[Kind]) -> Worker:
    return Worker(function, own.place, _folders(own.place), kinds, own.base_model, directory=str(own.directory))


@cache
def _folders(services: JobServices) -> Folders:
    """Both functions of a process read a job once."""
    return Folders(services.store)


@cache
def _language(directory: Path) -> Language:
    return Language.read(directory)
