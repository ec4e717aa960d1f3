"""A job's folder in the inbox, and the start that it stands for, which depends on its content alone.

The content is that of job.yaml and of every file it names. Where the exchange is and how often a file was uploaded make
no difference; one byte of any file does.
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
from knapper.jobs.services import JobServices
from knapper.jobs.spec import Parsed
from knapper.state import layout
from knapper.state.job_records import Started, read
from knapper.state.layout import ObjectKind, last_number
from knapper.store import Store


@dataclass(frozen=True)
class Content:
    """What a start depends on. `sha256s`: of the files that job.yaml names. `generation`: of job.yaml, if known."""

    tenant: Tenant
    job: str
    yaml: bytes
    sha256s: Mapping[str, str]
    generation: str = ""

    @property
    def first(self) -> Start:
        """The start of this content, unless it is started once more."""
        own = hashlib.sha256(self.yaml).hexdigest()
        content = msgspec.json.encode([own, sorted(self.sha256s.items())])
        return Start.of(self.tenant, self.job, hashlib.sha256(content).hexdigest())

    def repeated(self, n: int) -> Start:
        """The `n`th after the first."""
        return Start.of(self.tenant, self.job, f"{self.first.id} again {n}")


@dataclass(frozen=True)
class Upload:
    """The folder at one look. `files`: those that job.yaml names and that exist."""

    tenant: Tenant
    job: str
    job_yaml: Blob
    files: Mapping[str, Blob]

    @cached_property
    def content(self) -> Content:
        sha256s = {name: hashlib.sha256(blob.data).hexdigest() for name, blob in self.files.items()}
        return Content(self.tenant, self.job, self.job_yaml.data, sha256s, self.job_yaml.generation)

    @property
    def generations(self) -> dict[str, str]:
        """Generations in the exchange: while they are unchanged, nothing was uploaded since."""
        return {name: blob.generation for name, blob in {names.JOB_YAML: self.job_yaml, **self.files}.items()}


def of_job_yaml(tenant: Tenant, job: str, data: bytes) -> Start:
    """The placeholder of a job.yaml that cannot start: its files are incomplete, or it is invalid."""
    return Start.of(tenant, job, hashlib.sha256(data).hexdigest())


async def job_yaml(services: JobServices, tenant: Tenant, job: str) -> Blob | None:
    """Raises TooLarge."""
    return await services.exchange.read(f"{layout.inbox(tenant, job)}{names.JOB_YAML}", limits.job_yaml_bytes_max)


async def read_files(services: JobServices, tenant: Tenant, job: str, yaml: Blob, parsed: Parsed) -> Upload:
    """The folder with those files that exist. Raises TooLarge."""
    files = {}
    for name in parsed.files:
        at = f"{layout.inbox(tenant, job)}{names.file(name)}"
        if (blob := await services.exchange.read(at, limits.job_file_bytes_max)) is not None:
            files[name] = blob
    return Upload(tenant, job, yaml, files)


async def current(store: Store, content: Content) -> Start:
    """The newest start of this content: the first, unless a repetition was requested."""
    if (old := await _by_generation(store, content)) is not None:
        return old
    n = await _repetitions(store, content)
    return content.repeated(n) if n else content.first


async def repeat(store: Store, content: Content) -> Start:
    """Make a new start stand for this content."""
    n = await _repetitions(store, content)
    await store.put_if_absent(f"{content.first.repetitions}{number(n + 1)}", b"")
    return content.repeated(n + 1)


async def unchanged(store: Store, tenant: Tenant, job: str, generations: Mapping[str, str]) -> bool:
    """Whether the job's newest start was made from exactly these objects, so that none needs to be read."""
    listed = await store.list(ObjectKind.TENANT_START.under(tenant, job))
    if not listed:
        return False
    started = await read(store, Start(tenant, job, listed[-1].rpartition("/")[2]).started, Started)
    if started is None or not started.generations:
        return False
    return all(generations.get(name) == generation for name, generation in started.generations.items())


async def _repetitions(store: Store, content: Content) -> int:
    listed = await store.list(content.first.repetitions)
    return last_number(listed[-1]) if listed else 0


async def _by_generation(store: Store, content: Content) -> Start | None:
    """The start that an earlier knapper made of this content: it looked only at the generation of job.yaml."""
    old = Start.of(content.tenant, content.job, content.generation)
    started = await read(store, old.started, Started)
    if started is None or await _repetitions(store, content):
        return None
    same = started.job_yaml == content.yaml and started.files == content.sha256s
    return old if same else None
