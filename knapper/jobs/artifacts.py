"""What a job's newest start has published, as its owner may list and fetch it: adapter, metrics, rollouts, bill."""

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
    """`since`: what was published before, an earlier start of the job left; seconds since the epoch."""

    place: JobServices
    tenant: Tenant
    job: str
    since: float

    @staticmethod
    async def of(place: JobServices, tenant: Tenant, job: str) -> "Artifacts":
        """Raises NotFound."""
        found = await listings.newest(place.store, tenant, job)
        started = await read(place.store, found.start.started, Started)
        return Artifacts(place, tenant, found.start.job, 0.0 if started is None else started.started_at)

    @property
    def _prefix(self) -> str:
        return layout.outputs(self.tenant, self.job)

    async def listed(self) -> list[ListedObject]:
        """In the order of their names, which have the job's folder before them."""
        return [entry for entry in await self.place.exchange.list(self._prefix) if entry.modified_at >= self.since]

    def name(self, entry: ListedObject) -> str:
        """As the owner knows it."""
        return entry.name.removeprefix(self._prefix)

    async def open(self, name: str) -> Opened:
        """Raises NotFound, also for a name that no file can have."""
        found = await self.place.exchange.open(f"{self._prefix}{name}") if names.is_artifact(name) else None
        if found is not None and found.entry.modified_at >= self.since:
            return found
        if found is not None:
            found.close()
        raise NotFound(
            f"job {self.job!r} has no file {name[:200]!r}; `knapper jobs files {self.job}` lists those it has"
        )
