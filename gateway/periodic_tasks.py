"""The periodic tasks: lost doorbells, gaps in a run's sequence, lapsed sessions, usage, garbage collection."""

import signal
from functools import partial

import structlog

from gateway.periodic import PeriodicTask
from gateway.services import Services
from knapper.errors import Gone, KnapperError, Unavailable
from knapper.ids import RunId, Tenant, session_of
from knapper.jobs import staging
from knapper.jobs.revive import due
from knapper.state import damage
from knapper.store import forget_torn_writes

_TICK_S = 5.0
_JOBS_S = 15.0
_JOBS_AWAITING_FILES_S = 60.0  # the wait for files can time out
_JOBS_PAUSED_S = 60.0  # a paused job goes on this long after there is more quota
_JOBS_STALLED_S = 600.0  # every job that runs was notified, and none has made progress
_SAMPLE_USAGE_S = 60.0
_PARTS_S = 24 * 3600.0
_ACCOUNTS_S, _ACCOUNTS_OPEN_S, _ACCOUNTS_IDLE_S = 300.0, 1800.0, 24 * 3600.0
IDLE_S = 1800.0  # with nothing to do, work without a doorbell is found within this time

log = structlog.get_logger()


def tasks(gateway: Services) -> list[PeriodicTask]:
    """All periodic tasks except those for uploads. An idle gateway lists the store a few times an hour for them."""
    jobs_s = min(_JOBS_S, max(1.0, gateway.job_stalled_s / 4))
    return [
        PeriodicTask("publish", partial(publish, gateway), _TICK_S),
        PeriodicTask("tick", partial(tick, gateway), _TICK_S),
        PeriodicTask("jobs", partial(jobs, gateway), jobs_s, doorbell=gateway.wakeups.jobs),
        PeriodicTask("meter", partial(write_sample_usage, gateway), _SAMPLE_USAGE_S),
        PeriodicTask("settle", partial(settle_accounts, gateway), _ACCOUNTS_S, doorbell=gateway.wakeups.accounts),
        PeriodicTask("parts", partial(delete_stale_parts, gateway), _PARTS_S),
        PeriodicTask("collect", partial(collect, gateway), gateway.collector.pace_s, doorbell=gateway.wakeups.collect),
    ]


async def jobs(gateway: Services) -> float | None:
    """Notify stalled jobs again, and start those whose files have all arrived."""
    if gateway.job_services is None:
        return IDLE_S
    seen = gateway.seen_jobs
    for event in await due(gateway.job_services, seen, gateway.job_stalled_s):
        log.info("job has not moved: its event is sent again", job=event.subject, type=event.type, step=event.step)
        await gateway.job_services.notifier.post(event)
    if seen.lively:
        return None
    if seen.paused:
        return _JOBS_PAUSED_S
    return _JOBS_AWAITING_FILES_S if seen.awaiting else _JOBS_STALLED_S if seen.known else IDLE_S


async def begin(gateway: Services) -> None:
    """Runs before the first request. Raises InvalidField; the periodic tasks retry if the store is unavailable."""
    try:
        await publish(gateway)
        await gateway.accounts.begun()
    except Unavailable as error:
        log.warning("the store does not answer yet", reason=str(error))


async def end(gateway: Services) -> None:
    """Runs after the last request."""
    try:
        await write_sample_usage(gateway)
    except KnapperError as error:
        log.warning("tokens that were sampled lately are not counted", reason=str(error))
    try:
        await gateway.monitor.drawn.flush()
    except KnapperError as error:
        log.warning("samples that were drawn lately are not known to the next gateway", reason=str(error))
    try:
        await gateway.peers.gateways.leave()
    except KnapperError as error:
        log.warning("this gateway's address stays in the store until another finds nobody there", reason=str(error))


async def write_sample_usage(gateway: Services) -> None:
    """Store the usage of samples counted since the last time."""
    await gateway.sample_usage.flush()


async def settle_accounts(gateway: Services) -> float | None:
    """Enter the usage of runs in the ledger, so that reports need not read journals."""
    return _ACCOUNTS_OPEN_S if await gateway.accounts.update() else _ACCOUNTS_IDLE_S


async def publish(gateway: Services) -> None:
    """Update the catalogue from the declared models, if there are any.

    Where a model is missing although it was published, the store may be another one by now, emptied or replaced, and
    what this process remembers is of the old one. It ends then. Kubernetes starts the next one, which publishes its
    models and makes the key of the functions there.
    """
    if gateway.quota_file is not None and await gateway.quota_file.apply():
        log.info("quotas are those of the file")
    if gateway.declared_models is None:
        return
    if gateway.wakeups.store.is_set():
        gateway.wakeups.store.clear()
        if not (await gateway.declared_models.in_store() and await gateway.function_key.in_store()):
            log.error("the store was emptied or replaced under this gateway, which ends and is started anew")
            signal.raise_signal(signal.SIGTERM)
    if names := await gateway.declared_models.publish():
        log.info("models are published", names=names)


async def collect(gateway: Services) -> float | None:
    """Delete garbage. Sessions in which nothing happens are visited ever less often."""
    for run in gateway.train_client.changed_runs():
        gateway.collector.touch(session_of(run))
    if deleted := await gateway.collector.work():
        gateway.lookups.forget_samplers()
        log.info("garbage collected", sessions=len(deleted), objects=sum(deleted.values()))
    return gateway.collector.idle_s


async def delete_stale_parts(gateway: Services) -> None:
    """Delete parts of torn writes, of uploads that no job took in time, old episodes, and what dead gateways left."""
    await gateway.peers.remove_dead()
    if count := await gateway.captures.expire():
        log.info("captured episodes are deleted: they are too old", episodes=count)
    if count := await forget_torn_writes(gateway.store, gateway.clock()):
        log.info("parts of torn writes are deleted", objects=count)
    if gateway.job_services is not None and (
        count := await staging.expire(gateway.job_services.exchange, gateway.clock())
    ):
        log.info("parts of unfinished uploads are deleted", parts=count)


async def tick(gateway: Services) -> None:
    gateway.sample_queue.expire()
    for session in gateway.heartbeats.lapsed():
        log.info("session timed out: no heartbeat", session=session)
        gateway.sample_queue.cancel_session(session, Gone(f"session {session} has not been heard of for too long"))
        for run in gateway.train_client.runs():
            if session_of(run) == session:
                await gateway.train_client.forget(run)  # from memory; the next poll or request adds it again
    train_client = gateway.train_client
    stalled = {run: seqs for run, seqs in train_client.unfinished().items() if not train_client.is_streaming(run)}
    for run in gateway.unfinished_runs.due(stalled):
        await damage.unless(revive(gateway, run), None)
        gateway.unfinished_runs.checked(run)
    await gateway.admission.renew()
    for sampler in gateway.sample_queue.active_samplers():
        gateway.collector.touch_sampler(sampler)
    await gateway.collector.show_uses()
    if gateway.sample_queue.empty:
        await gateway.peers.gateways.withdraw(lambda: gateway.sample_queue.empty)
    else:
        await gateway.peers.gateways.publish()
    await gateway.monitor.drawn.flush()


async def revive(gateway: Services, run: RunId) -> None:
    """Fill the sequence gaps of a run whose client is gone or has waited long enough, and ring for its operations."""
    finished = await gateway.lookups.sessions.finished(session_of(run)) is not None
    tenant = Tenant((await gateway.lookups.spec_of(run)).tenant)
    filled = []
    if finished or not await gateway.admission.pauses(tenant):  # else the client sends them once its quota is free
        filled = await gateway.acceptor.fill_gaps(run, gateway.results.applied(run), finished)
    if filled:
        log.info("operations that never arrived are skipped", run=run, seqs=filled[:10], count=len(filled))
    if not gateway.train_client.is_ringing(run):
        gateway.train_client.ring(run)
