"""What each tenant has made: names only, so that a list of all costs one listing and no reading.

A name is written before the thing that it names. So nothing exists that is not listed; what is listed and was never
made (its maker died in between) answers as missing.
"""

from dataclasses import dataclass

from knapper import ids
from knapper.ids import RunId, SessionId, Tenant
from knapper.state import damage
from knapper.state.sessions import Session
from knapper.store import Store


@dataclass(frozen=True)
class Listed:
    """A session, and when it was created in microseconds since the epoch."""

    created_us: int
    session: SessionId


@dataclass(frozen=True)
class Register:
    """tenants/<tenant>/sessions/<microseconds>-<session> and tenants/<tenant>/runs/<microseconds>-<session>/<n>"""

    store: Store

    async def add_session(self, session: Session) -> None:
        await self.store.put_if_absent(f"tenants/{session.tenant}/sessions/{_place(session)}", b"")

    async def add_run(self, session: Session, run: RunId) -> None:
        number = int(run.rpartition(":")[2])
        await self.store.put_if_absent(f"tenants/{session.tenant}/runs/{_place(session)}/{ids.number(number)}", b"")

    async def remove_session(self, session: Session) -> None:
        await self.store.delete(f"tenants/{session.tenant}/sessions/{_place(session)}")

    async def remove_run(self, session: Session, run: RunId) -> None:
        number = int(run.rpartition(":")[2])
        await self.store.delete(f"tenants/{session.tenant}/runs/{_place(session)}/{ids.number(number)}")

    async def sessions(self, tenant: str) -> list[Listed]:
        """Newest first."""
        prefix = f"tenants/{tenant}/sessions/"
        return damage.parsed(reversed(await self.store.list(prefix)), lambda name: _listed(name.removeprefix(prefix)))

    async def runs(self, tenant: str, session: Session | None = None) -> list[RunId]:
        """Those of the newest session first, and of a session the newest; all, or those of one session."""
        prefix = f"tenants/{tenant}/runs/"
        names = await self.store.list(f"{prefix}{_place(session)}/" if session is not None else prefix)
        return damage.parsed(reversed(names), lambda name: _run(name.removeprefix(prefix)))

    async def everybodys_runs(self) -> list[tuple[Tenant, RunId]]:
        """Of all tenants, in no order that means anything."""
        listed = [name for name in await self.store.list("tenants/") if "/runs/" in name]
        return damage.parsed(listed, _tenants_run)


def _place(session: Session) -> str:
    return f"{ids.number(int(session.created_at * 1e6))}-{session.session}"


def _listed(place: str) -> Listed:
    """Raises ValueError for a name that none of ours is."""
    created_us, session = place.split("-", 1)
    return Listed(int(created_us), SessionId(session))


def _run(name: str) -> RunId:
    """Raises ValueError for a name that none of ours is."""
    place, _, number = name.partition("/")
    return ids.make_run_id(_listed(place).session, int(number))


def _tenants_run(name: str) -> tuple[Tenant, RunId]:
    _, tenant, _, rest = name.split("/", 3)
    return Tenant(tenant), _run(rest)
