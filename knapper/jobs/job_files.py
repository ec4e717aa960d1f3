"""Jobs as this process has read them: the record of the start, and the files copied with it."""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knapper.errors import NotFound, damaged
from knapper.jobs import datasets, spec
from knapper.jobs.names import Start
from knapper.jobs.progress import Outline
from knapper.jobs.rows import Row
from knapper.jobs.spec import AnyJob
from knapper.jobs.sweep import trials
from knapper.state.job_records import Started, read
from knapper.store import Store
from knapper.store.cache import LruCache

_CACHED_MAX = 8


@dataclass(frozen=True)
class Folder:
    """One started job. It never changes, so it is read once."""

    start: Start
    started: Started
    job: AnyJob
    rows: Sequence[Row]
    held_out: Sequence[Row]
    files: Mapping[str, bytes]

    @property
    def outline(self) -> Outline:
        return Outline(self.start, self.job, len(self.held_out))


class Folders:
    """A cache of the most recently used folders."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cached: LruCache[Start, Folder] = LruCache(_CACHED_MAX)

    async def read(self, start: Start) -> Folder:
        """Raises NotFound for a job that was never started, Corrupt if its files are not what its record says."""
        return await self._cached.get_once(start, lambda: _read(self._store, start))


async def _read(store: Store, start: Start) -> Folder:
    started = await read(store, start.started, Started)
    if started is None:
        raise NotFound(f"job {start} was never started; put job.yaml and its files into its inbox")
    job = spec.decode(started.spec_json)
    files = await files_of(store, start, started)
    rows = await asyncio.to_thread(datasets.rows, job, job.data, files.pop(job.data))
    held_out: Sequence[Row] = []
    if job.evaluate is not None:
        data = files.pop(job.evaluate.data, None)
        if data is None:  # the same file as the data
            held_out = rows
        else:
            held_out = await asyncio.to_thread(datasets.rows, job, job.evaluate.data, data)
    return Folder(start, started, job, rows, held_out, files)


async def files_of(store: Store, start: Start, started: Started) -> dict[str, bytes]:
    """By name. Those of a trial are its sweep's. Raises Corrupt if they are not what the record says."""
    keeper = trials.of_trial(start, started) or start
    files = {}
    for name, sha256 in started.files.items():
        key = keeper.content(sha256)
        data = await store.get(key)
        if data is None:
            raise damaged(key, f"it is missing, and was {name} of job {start}")
        if await asyncio.to_thread(_sha256, data) != sha256:
            raise damaged(key, f"its {len(data)} bytes differ from those that {name} of job {start} had")
        files[name] = data
    return files


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
