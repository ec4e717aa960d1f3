"""The end of a job for good: its bytes go, in the exchange and in the store, of all of its starts.

Safe to cut off and to repeat: what lists the job goes last. Of each start stays what became of it, which ends with
that it is deleted; what was used stays on the bill.
"""

from collections.abc import Awaitable, Callable

from knapper.ids import RunId, Tenant
from knapper.jobs import control, names
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.state import layout
from knapper.state.layout import ObjectKind
from knapper.store import Store


async def mark(place: JobServices, tenant: Tenant, job: str) -> None:
    """From now on it can neither run nor be resumed. Raises UserError while it runs; then nothing is changed."""
    for start in reversed(await _starts(place.store, tenant, job)):  # if any runs, the newest does
        if await place.store.get(start.started) is not None:
            await control.ask(place.store, start, "deleted", "deleted by its owner", place.clock())


async def delete(place: JobServices, tenant: Tenant, job: str, erase: Callable[[RunId], Awaitable[None]]) -> None:
    """What is marked. `erase`: a run, with all that is of it, if it was ever made."""
    inbox = layout.inbox(tenant, job)
    await place.exchange.remove(f"{inbox}{names.JOB_YAML}")  # first: without it nothing starts
    for prefix in (inbox, layout.outputs(tenant, job)):
        for entry in await place.exchange.list(prefix):
            await place.exchange.remove(entry.name)
    starts = await _starts(place.store, tenant, job)
    for start in starts:
        await erase(start.run)
        await erase(start.reference)
        await _delete_records(place.store, start)
    for start in starts:
        await _unlist(place.store, start)


async def _starts(store: Store, tenant: Tenant, job: str) -> list[Start]:
    """All that are listed, the oldest first."""
    found = [name.rpartition("/")[2] for name in await store.list(ObjectKind.TENANT_START.under(tenant, job))]
    old = [
        name.split("/") for name in await store.list(ObjectKind.TENANT_JOB.under(tenant))
    ]  # from before there was a list by job
    found += [parts[-1] for parts in old if parts[-2] == job]
    return [Start(tenant, job, each) for each in dict.fromkeys(found)]


async def _delete_records(store: Store, start: Start) -> None:
    """All but what says that it is deleted, and how often its content was started: another start may come of that."""
    for name in await store.list(start.prefix):
        if not name.startswith((start.controls, start.repetitions)):
            await store.delete(name)
    await store.delete(start.working)
    await store.delete(start.expected)


async def _unlist(store: Store, start: Start) -> None:
    for prefix in (ObjectKind.TENANT_JOB.under(start.tenant), ObjectKind.TENANT_START.under(start.tenant, start.job)):
        for name in await store.list(prefix):
            if name.endswith(f"/{start.id}"):
                await store.delete(name)
