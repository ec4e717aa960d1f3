"""Which results a job may still need from its runs: all since its newest complete step.

A job that continues after a break sends the operations of its current step again, and gets their first results.
"""

from knapper.ids import RunId, Tenant
from knapper.jobs import control
from knapper.jobs.names import Start
from knapper.jobs.progress import newest_step
from knapper.state.gc.lookups import Need
from knapper.state.job_records import Trained, read
from knapper.state.layout import ObjectKind
from knapper.state.sessions import Session
from knapper.store import Store

TAG = "job"  # of the sessions that jobs make


async def of(store: Store, session: Session, run: RunId) -> Need:
    """The need for a run in this session."""
    if TAG not in session.tags:
        return Need()
    for name in await store.list(ObjectKind.TENANT_JOB.under(session.tenant)):
        start = Start(Tenant(session.tenant), *ObjectKind.TENANT_JOB.parse(name)[2:])
        if start.session == session.session:
            return await _of(store, start, run)
    return Need()  # a client may give its sessions any tags


async def _of(store: Store, start: Start, run: RunId) -> Need:
    state = (await control.now(store, start)).state
    if state == "completed":
        return Need()
    steps = await newest_step(store, start)
    trained = await read(store, start.trained(steps - 1), Trained) if steps else None
    if trained is None:
        return Need(0, running=state == "running")
    return Need(trained.next_seq if run == start.run else trained.reference_seq, running=state == "running")
