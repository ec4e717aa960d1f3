"""Names of jobs as names of what they made: their sessions, their runs, their adapters."""

from knapper.ids import RunId, Tenant
from knapper.jobs import listings, needs
from knapper.state.sessions import Session
from knapper.store import Store

_BEFORE = "job "  # what stood before it in sessions of earlier versions


def of(session: Session | None) -> str:
    """Of the job that made the session; empty for a client's."""
    return session.display_name.removeprefix(_BEFORE) if session is not None and needs.TAG in session.tags else ""


async def newest(store: Store, tenant: Tenant) -> dict[RunId, str]:
    """By the run of the newest start of each job, whether it was made or not."""
    return {each.start.run: each.start.job for each in await listings.listed(store, tenant)}
