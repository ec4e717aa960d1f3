"""What the engines' functions do for jobs, made once a process."""

import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from knapper import metrics
from knapper.errors import Unservable
from knapper.events import Event
from knapper.jobs import waiting
from knapper.jobs.folders import Folders
from knapper.jobs.names import Start
from knapper.jobs.operations import Journal
from knapper.jobs.place import Place, open_place
from knapper.jobs.sampling import Sampling
from knapper.jobs.spec import KINDS, Kind
from knapper.jobs.training import Training
from knapper.jobs.working import Worker
from knapper.language import Language
from knapper.serving import gates
from knapper.serving.sampling import Served, served
from knapper.settings import Settings
from knapper.store.opening import open_store

if TYPE_CHECKING:
    from knapper.serving.engine import Engine


async def train(event: Event) -> None:
    """train_step's part of a job. Raises Unservable, of which the job then tells its user."""
    await _answer(training, event)


async def sample(event: Event) -> None:
    """sample's part, likewise."""
    await _answer(sampling, event)


async def _answer(part: Callable[[], Training | Sampling], event: Event) -> None:
    try:
        worker = part()
    except Unservable as error:
        await waiting.note(place(), Start.parse(event.subject), str(error))
        raise
    await worker.answer(event)


@cache
def place() -> Place:
    """Where the state lies, with or without an engine."""
    settings = Settings.load(os.environ)
    return open_place(settings, metrics.CountedStore(open_store(settings)), time.time)


@cache
def sampling() -> Sampling:
    own = served()
    return Sampling(_worker(own, ["rl"]), own.sampler, _language(own.directory), own.context)


@cache
def training() -> Training:
    own = gates.engine().value()
    journal = Journal(own.place.store, own.residents, own.place.clock)
    return Training(_worker(own, KINDS), journal, _language(own.directory), own.context)


def _worker(own: "Engine | Served", kinds: Sequence[Kind]) -> Worker:
    return Worker(own.place, _folders(own.place), kinds, own.base_model, directory=str(own.directory))


@cache
def _folders(place: Place) -> Folders:
    """Both functions of a process read a job once."""
    return Folders(place.store)


@cache
def _language(directory: Path) -> Language:
    return Language.read(directory)
