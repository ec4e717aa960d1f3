"""Job names for the sessions, runs and adapters that jobs made."""

from knapper.ids import RunId, Tenant
from knapper.jobs import listings, needs
from knapper.jobs.spec import decode
from knapper.jobs.sweep import trials
from knapper.state.job_records import Started, read
from knapper.state.sessions import Session
from knapper.store import Store

_BEFORE = "job "  # the prefix in sessions of earlier versions


def of(session: Session | None) -> str:
    """The job that made the session; empty for a client's session."""
    return session.display_name.removeprefix(_BEFORE) if session is not None and needs.TAG in session.tags else ""


async def adapter_of(store: Store, tenant: Tenant, job: str) -> RunId | None:
    """The run that makes the job's adapter, whether it exists or not; of a sweep, that of its best trial so far.

    None if there is no such job.
    """
    start = next((each.start for each in await listings.listed(store, tenant) if each.start.job == job), None)
    started = None if start is None else await read(store, start.started, Started)
    if start is None or started is None:
        return None if start is None else start.run
    of_job = decode(started.spec_json)
    if of_job.sweep is None:
        return start.run
    _, goal = trials.metric(of_job, of_job.sweep)
    best = trials.best(goal, await trials.read_all(store, start))
    return start.run if best is None else best.start.run


async def newest(store: Store, tenant: Tenant) -> dict[RunId, str]:
    """Job names by the run of each job's newest start, whether the run exists or not."""
    return {each.start.run: each.start.job for each in await listings.listed(store, tenant)}
