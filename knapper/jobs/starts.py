"""The start of a job: its files, its place in the lists, and the record `started`, which is written last."""

from collections.abc import Mapping

import structlog

from knapper.errors import NotFound
from knapper.jobs import control, names, outputs, spec
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.jobs.sweep import halt
from knapper.state import layout
from knapper.state.job_records import Started, encode, read
from knapper.state.layout import ObjectKind

log = structlog.get_logger()


async def started(services: JobServices, start: Start) -> Started:
    """Raises NotFound."""
    record = await read(services.store, start.started, Started)
    if record is None:
        raise NotFound(f"job {start} was not started; put job.yaml and its files into {start.tenant}'s inbox")
    return record


async def begin(services: JobServices, start: Start, started: Started, files: Mapping[str, bytes]) -> bool:
    """True if this call has started the job. `files`: those that nobody else keeps for it."""
    store = services.store
    for name, data in files.items():
        await store.put_if_absent(start.content(started.files[name]), data)
    await list_once(services, start)
    await store.put_if_absent(start.working, b"")
    await _end_earlier(services, start)
    won = await store.put_if_absent(start.started, encode(started))
    await store.put_if_absent(start.working, b"")  # again: `revive` removes those that never started
    if not won:
        return False
    await services.exchange.remove(f"{layout.inbox(start.tenant, start.job)}{names.JOB_ERROR}")
    job = spec.decode(started.spec_json)
    log.info("job started", job=str(start), kind=job.kind, rows=started.rows, adapts=",".join(job.lora.adapts))
    await outputs.publish_status(services, started)
    return True


async def _end_earlier(services: JobServices, start: Start) -> None:
    """End earlier starts of the job: they would overwrite each other's results."""
    for name in await services.store.list(ObjectKind.JOB_WORKING.under(start.tenant, start.job)):
        other = Start(start.tenant, start.job, name.rpartition("/")[2])
        if other != start and await services.store.get(other.started) is not None:
            reason = f"{control.REPLACED}: start {start.id} took its place"
            if await control.change(services.store, other, "cancelled", reason, services.clock()):
                await halt.all_trials(services, other)
                await services.store.delete(other.working)


async def list_once(services: JobServices, start: Start) -> None:
    """Add to the tenant's lists: once, or twice after a crash here, which changes nothing."""
    if await services.store.get(start.listed) is None:
        await list_now(services, start)
        await services.store.put_if_absent(start.listed, b"")


async def list_now(services: JobServices, start: Start) -> None:
    at = int(services.clock() * 1e6)
    await services.store.put_if_absent(ObjectKind.TENANT_START.key(start.tenant, start.job, at, start.id), b"")
    await services.store.put_if_absent(ObjectKind.TENANT_JOB.key(start.tenant, at, start.job, start.id), b"")
