"""What lies in a job's folder of the inbox, and which start that is: by its content, and by nothing else.

The content is that of job.yaml and of every file that it names. Where the exchange is, and how often a file was
uploaded, change nothing; one byte of any of them does.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec

from knapper import limits
from knapper.exchange import Blob
from knapper.ids import Tenant, number
from knapper.jobs import names
from knapper.jobs.names import Start
from knapper.jobs.records import Started, read
from knapper.jobs.services import Place
from knapper.jobs.spec import Parsed
from knapper.state import layout
from knapper.state.layout import ObjectKind, last_number
from knapper.store import Store


@dataclass(frozen=True)
class Upload:
    """One look at the folder. `files`: those that job.yaml names and that are there."""

    tenant: Tenant
    job: str
    job_yaml: Blob
    files: Mapping[str, Blob]

    @cached_property
    def sha256s(self) -> dict[str, str]:
        return {name: hashlib.sha256(blob.data).hexdigest() for name, blob in self.files.items()}

    @property
    def generations(self) -> dict[str, str]:
        """In the exchange: while all are these, nothing was uploaded since."""
        return {name: blob.generation for name, blob in {names.JOB_YAML: self.job_yaml, **self.files}.items()}

    @property
    def first(self) -> Start:
        """The start of this content, unless it is started once more."""
        own = hashlib.sha256(self.job_yaml.data).hexdigest()
        told = msgspec.json.encode([own, sorted(self.sha256s.items())])
        return Start.of(self.tenant, self.job, hashlib.sha256(told).hexdigest())

    def repeated(self, n: int) -> Start:
        """The `n`th after the first."""
        return Start.of(self.tenant, self.job, f"{self.first.id} again {n}")


def of_job_yaml(tenant: Tenant, job: str, data: bytes) -> Start:
    """What stands for a job.yaml that cannot be started: its files are not all there, or it is wrong."""
    return Start.of(tenant, job, hashlib.sha256(data).hexdigest())


async def job_yaml(place: Place, tenant: Tenant, job: str) -> Blob | None:
    """Raises TooLarge."""
    return await place.exchange.read(f"{layout.inbox(tenant, job)}{names.JOB_YAML}", limits.job_yaml_bytes_max)


async def read_files(place: Place, tenant: Tenant, job: str, found: Blob, parsed: Parsed) -> Upload:
    """With those files that are there. Raises TooLarge."""
    files = {}
    for name in parsed.job.files:
        at = f"{layout.inbox(tenant, job)}{names.file(name)}"
        if (blob := await place.exchange.read(at, limits.job_file_bytes_max)) is not None:
            files[name] = blob
    return Upload(tenant, job, found, files)


async def current(store: Store, upload: Upload) -> Start:
    """The newest start of this content: the first, unless somebody asked for it once more."""
    if (old := await _by_generation(store, upload)) is not None:
        return old
    n = await _repetitions(store, upload)
    return upload.repeated(n) if n else upload.first


async def repeat(store: Store, upload: Upload) -> Start:
    """From now on another start stands for this content."""
    n = await _repetitions(store, upload)
    await store.put_if_absent(f"{upload.first.repetitions}{number(n + 1)}", b"")
    return upload.repeated(n + 1)


async def unchanged(store: Store, tenant: Tenant, job: str, generations: Mapping[str, str]) -> bool:
    """Whether the job's newest start was made from just these objects, so that none needs to be read."""
    listed = await store.list(ObjectKind.TENANT_START.under(tenant, job))
    if not listed:
        return False
    started = await read(store, Start(tenant, job, listed[-1].rpartition("/")[2]).started, Started)
    if started is None or not started.generations:
        return False
    return all(generations.get(name) == generation for name, generation in started.generations.items())


async def _repetitions(store: Store, upload: Upload) -> int:
    listed = await store.list(upload.first.repetitions)
    return last_number(listed[-1]) if listed else 0


async def _by_generation(store: Store, upload: Upload) -> Start | None:
    """The start that an earlier version made of this content: it looked at the generation of job.yaml alone."""
    old = Start.of(upload.tenant, upload.job, upload.job_yaml.generation)
    started = await read(store, old.started, Started)
    if started is None or await _repetitions(store, upload):
        return None
    same = started.job_yaml == upload.job_yaml.data and started.files == upload.sha256s
    return old if same else None
