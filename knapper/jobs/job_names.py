"""Job names for the sessions, runs and adapters that jobs made."""

from knapper.ids import RunId, Tenant
from knapper.jobs import listings, needs
from knapper.state.sessions import Session
from knapper.store import Store

_BEFORE = "job "  # the prefix in sessions of earlier versions


def of(session: Session | None) -> str:
    """The job that made the session; empty for a client's session."""
    return session.display_name.removeprefix(_BEFORE) if session is not None and needs.TAG in session.tags else ""


async def newest(store: Store, tenant: Tenant) -> dict[RunId, str]:
    """Job names by the run of each job's newest start, whether the run exists or not."""
    return {each.start.run: each.start.job for each in await listings.listed(store, tenant)}
