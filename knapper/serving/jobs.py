"""What the engines' functions do for jobs, made once a process."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from knapper.jobs.folders import Folders
from knapper.jobs.operations import Journal
from knapper.jobs.place import Place
from knapper.jobs.sampling import Sampling
from knapper.jobs.spec import KINDS, Kind
from knapper.jobs.training import Training
from knapper.jobs.working import Worker
from knapper.language import Language
from knapper.serving.engine import engine
from knapper.serving.sampling import served


@cache
def sampling() -> Sampling:
    own = served()
    return Sampling(_worker(own.place, own.base_model, ["rl"]), own.sampler, _language(own.directory), own.context)


@cache
def training() -> Training:
    own = engine()
    journal = Journal(own.place.store, own.residents, own.place.clock)
    return Training(_worker(own.place, own.base_model, KINDS), journal, _language(own.directory), own.context)


def _worker(place: Place, base_model: str, kinds: Sequence[Kind]) -> Worker:
    return Worker(place, _folders(place), kinds, base_model)


@cache
def _folders(place: Place) -> Folders:
    """Both functions of a process read a job once."""
    return Folders(place.store)


@cache
def _language(directory: Path) -> Language:
    return Language.read(directory)
