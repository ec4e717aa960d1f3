"""What the engines' functions do for jobs, made once a process."""

from collections.abc import Sequence
from functools import cache

from knapper.jobs.folders import Folders
from knapper.jobs.operations import Journal
from knapper.jobs.sampling import Sampling
from knapper.jobs.spec import KINDS, Kind
from knapper.jobs.training import Training
from knapper.jobs.working import Worker
from knapper.language import Language
from knapper.serving.engine import engine


@cache
def sampling() -> Sampling:
    served = engine()
    return Sampling(_worker(["rl"]), served.sampler, _language(), served.context)


@cache
def training() -> Training:
    served = engine()
    journal = Journal(served.place.store, served.residents, served.place.clock)
    return Training(_worker(KINDS), journal, _language(), served.context)


def _worker(kinds: Sequence[Kind]) -> Worker:
    served = engine()
    return Worker(served.place, _folders(), kinds, served.base_model)


@cache
def _folders() -> Folders:
    """Both functions of a process read a job once."""
    return Folders(engine().place.store)


@cache
def _language() -> Language:
    return Language.read(engine().directory)
