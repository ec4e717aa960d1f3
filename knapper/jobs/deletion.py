"""Deletes a job for good: the files of all its starts, in the exchange and in the store.

Safe to interrupt and repeat: its entries in the lists go last. The state record of each start stays, and says that it
is deleted; usage stays on record.
"""

from collections.abc import Awaitable, Callable

from knapper.ids import RunId, Tenant
from knapper.jobs import control, names
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.state import layout
from knapper.state.layout import ObjectKind
from knapper.store import Store


async def mark(services: JobServices, tenant: Tenant, job: str) -> None:
    """Mark the job as deleted, with its trials: it can neither run nor be resumed. Raises UserError while it runs."""
    await _mark(services, tenant, job)
    for trial in await _trials(services.store, tenant, job):
        await _mark(services, tenant, trial)


async def _mark(services: JobServices, tenant: Tenant, job: str) -> None:
    for start in reversed(await _starts(services.store, tenant, job)):  # if one runs, it is the newest
        if await services.store.get(start.started) is not None:
            await control.ask(services.store, start, "deleted", "deleted by its owner", services.clock())


async def delete(services: JobServices, tenant: Tenant, job: str, erase: Callable[[RunId], Awaitable[None]]) -> None:
    """Delete a marked job, its trials first. `erase`: deletes a run with everything of it, if it was ever made."""
    for trial in await _trials(services.store, tenant, job):
        await delete(services, tenant, trial, erase)
    inbox = layout.inbox(tenant, job)
    await services.exchange.remove(f"{inbox}{names.JOB_YAML}")  # first: without it nothing starts
    for prefix in (inbox, layout.outputs(tenant, job)):
        for entry in await services.exchange.list(prefix):
            await services.exchange.remove(entry.name)
    starts = await _starts(services.store, tenant, job)
    for start in starts:
        await erase(start.run)
        await erase(start.reference)
        await _delete_records(services.store, start)
    for start in starts:
        await _unlist(services.store, start)


async def _trials(store: Store, tenant: Tenant, job: str) -> list[str]:
    """The jobs of all trials that any start of the job has had, if it is a sweep."""
    listed = await store.list(ObjectKind.TENANT_START.under(tenant, f"{job}.")[:-1])
    found = dict.fromkeys(ObjectKind.TENANT_START.parse(name)[1] for name in listed)
    return [name for name in found if names.sweep_of(name) == job]


async def _starts(store: Store, tenant: Tenant, job: str) -> list[Start]:
    """All listed starts, the oldest first."""
    ids = [name.rpartition("/")[2] for name in await store.list(ObjectKind.TENANT_START.under(tenant, job))]
    old = [
        name.split("/") for name in await store.list(ObjectKind.TENANT_JOB.under(tenant))
    ]  # from before there was a list by job
    ids += [parts[-1] for parts in old if parts[-2] == job]
    return [Start(tenant, job, start) for start in dict.fromkeys(ids)]


async def _delete_records(store: Store, start: Start) -> None:
    """All but the state and the count of repetitions: the same content may be started again."""
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
