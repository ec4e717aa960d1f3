"""The files that a job's newest start has published for its owner: adapter, metrics, rollouts, bill."""

from dataclasses import dataclass

from knapper.errors import NotFound
from knapper.exchange import ListedObject, Opened
from knapper.ids import Tenant
from knapper.jobs import listings, names
from knapper.jobs.services import JobServices
from knapper.state import layout
from knapper.state.job_records import Started, read


@dataclass(frozen=True)
class Artifacts:
    """`since`: files published before this are of an earlier start; seconds since the epoch."""

    services: JobServices
    tenant: Tenant
    job: str
    since: float

    @staticmethod
    async def of(services: JobServices, tenant: Tenant, job: str) -> "Artifacts":
        """Raises NotFound."""
        listing = await listings.newest(services.store, tenant, job)
        started = await read(services.store, listing.start.started, Started)
        return Artifacts(services, tenant, listing.start.job, 0.0 if started is None else started.started_at)

    @property
    def _prefix(self) -> str:
        return layout.outputs(self.tenant, self.job)

    async def listed(self) -> list[ListedObject]:
        """In the order of their names, which begin with the job's folder."""
        return [entry for entry in await self.services.exchange.list(self._prefix) if entry.modified_at >= self.since]

    def name(self, entry: ListedObject) -> str:
        """The name as its owner knows it."""
        return entry.name.removeprefix(self._prefix)

    async def open(self, name: str) -> Opened:
        """Raises NotFound, also for a name that no file can have."""
        opened = await self.services.exchange.open(f"{self._prefix}{name}") if names.is_artifact(name) else None
        if opened is not None and opened.entry.modified_at >= self.since:
            return opened
        if opened is not None:
            opened.close()
        raise NotFound(
            f"job {self.job!r} has no file {name[:200]!r}; `knapper jobs files {self.job}` lists those it has"
        )
