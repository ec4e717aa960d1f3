"""The sessions and runs of each tenant, as names without content: a list of them costs one listing and no reads.

A name is written before its object, so that every object is listed. A listed object that was never created (its writer
died in between) reads as missing.
"""

from dataclasses import dataclass

from knapper import ids
from knapper.ids import RunId, SessionId, Tenant
from knapper.state import damage, recent
from knapper.state.layout import ObjectKind
from knapper.state.recent import PageStart
from knapper.state.sessions import Session
from knapper.store import Store


@dataclass(frozen=True)
class SessionListing:
    """A session, and when it was created in microseconds since the epoch."""

    created_us: int
    session: SessionId


@dataclass(frozen=True)
class Register:
    """The sessions and the training runs of each tenant."""

    store: Store

    async def add_session(self, session: Session) -> None:
        await self.store.put_if_absent(_session_key(session), b"")

    async def add_run(self, session: Session, run: RunId) -> None:
        await self.store.put_if_absent(_run_key(session, run), b"")

    async def remove_session(self, session: Session) -> None:
        await self.store.delete(_session_key(session))

    async def remove_run(self, session: Session, run: RunId) -> None:
        await self.store.delete(_run_key(session, run))

    async def sessions(self, tenant: str) -> list[SessionListing]:
        """Newest first."""
        return damage.parsed(reversed(await self.store.list(ObjectKind.TENANT_SESSION.under(tenant))), _listed)

    async def runs(self, tenant: str, session: Session | None = None) -> list[RunId]:
        """The tenant's runs, or those of one session: newest session first, newest run of a session first."""
        fields = () if session is None else _fields(session)
        names = await self.store.list(ObjectKind.TENANT_RUN.under(tenant, *fields))
        return [run for _, run in damage.parsed(reversed(names), _run)]

    async def runs_page(self, tenant: str, size: int, start: PageStart) -> tuple[list[RunId], PageStart | None]:
        """(the tenant's newest runs from there on, where the page after them begins)"""
        page = await recent.page(self.store, ObjectKind.TENANT_RUN.under(tenant), size, start)
        return [run for _, run in damage.parsed(page.names, _run)], page.older

    async def sessions_page(
        self, tenant: str, size: int, start: PageStart
    ) -> tuple[list[SessionListing], PageStart | None]:
        """(the tenant's newest sessions from there on, where the page after them begins)"""
        page = await recent.page(self.store, ObjectKind.TENANT_SESSION.under(tenant), size, start)
        return damage.parsed(page.names, _listed), page.older

    async def runs_of_all_tenants(self) -> list[tuple[Tenant, RunId]]:
        """(tenant, run) of all tenants, in no particular order."""
        names = [name for name in await self.store.list(ObjectKind.TENANT_RUN.under()) if "/runs/" in name]
        return damage.parsed(names, _run)


def _fields(session: Session) -> tuple[int, str]:
    return int(session.created_at * 1e6), session.session


def _session_key(session: Session) -> str:
    return ObjectKind.TENANT_SESSION.key(session.tenant, *_fields(session))


def _run_key(session: Session, run: RunId) -> str:
    return ObjectKind.TENANT_RUN.key(session.tenant, *_fields(session), int(run.rpartition(":")[2]))


def _listed(key: str) -> SessionListing:
    """Raises ValueError for a key of another form."""
    _, created_us, session = ObjectKind.TENANT_SESSION.parse(key)
    return SessionListing(int(created_us), SessionId(session))


def _run(key: str) -> tuple[Tenant, RunId]:
    """Raises ValueError for a key of another form."""
    tenant, _, session, n = ObjectKind.TENANT_RUN.parse(key)
    return Tenant(tenant), ids.make_run_id(SessionId(session), int(n))
