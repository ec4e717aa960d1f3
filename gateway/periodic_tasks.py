"""What happens by itself: forgotten bells, holes in the order of a run, clients that fell silent, leftovers."""

from functools import partial

import structlog

from gateway.periodic import Chore
from gateway.services import Services
from knapper.errors import Gone, KnapperError, Unavailable
from knapper.ids import RunId, session_of
from knapper.jobs import staging
from knapper.jobs.revive import due
from knapper.state import damage
from knapper.store import forget_torn_writes

_TICK_S = 5.0
_JOBS_S = 15.0
_AWAITING_S = 60.0  # jobs are looked at so often at least while files are awaited, which may be given up
_WAITING_S = 600.0  # and so often while all that run were rung for, and do not move
_METER_S = 60.0
_PARTS_S = 24 * 3600.0
_ACCOUNTS_S, _ACCOUNTS_OPEN_S, _ACCOUNTS_REST_S = 300.0, 1800.0, 24 * 3600.0
REST_S = 1800.0  # where there is nothing to do, what nobody told of is found after this

log = structlog.get_logger()


def chores(gateway: Services) -> list[Chore]:
    """All of it, but for uploads. What is told by the store costs a few listings an hour where nothing happens."""
    jobs_s = min(_JOBS_S, max(1.0, gateway.job_stalled_s / 4))
    return [
        Chore("publish", partial(publish, gateway), _TICK_S),
        Chore("tick", partial(tick, gateway), _TICK_S),
        Chore("jobs", partial(jobs, gateway), jobs_s, stirred=gateway.stirs.jobs),
        Chore("meter", partial(meter, gateway), _METER_S),
        Chore("settle", partial(settle, gateway), _ACCOUNTS_S, stirred=gateway.stirs.accounts),
        Chore("parts", partial(parts_left, gateway), _PARTS_S),
        Chore("collect", partial(collect, gateway), gateway.collector.pace_s, stirred=gateway.stirs.collect),
    ]


async def jobs(gateway: Services) -> float | None:
    """Ring again for jobs that do not move, and start those whose files are all there now."""
    if gateway.place is None:
        return REST_S
    seen = gateway.seen_jobs
    for bell in await due(gateway.place, seen, gateway.job_stalled_s):
        log.info("job has not moved: its event is sent again", job=bell.subject, type=bell.type, step=bell.step)
        await gateway.place.notifier.post(bell)
    if seen.lively:
        return None
    return _AWAITING_S if seen.awaiting else _WAITING_S if seen.known else REST_S


async def begin(gateway: Services) -> None:
    """What comes before the first request. Raises InvalidField; a store that does not answer yet is asked again."""
    try:
        await publish(gateway)
        await gateway.accounts.begun()
    except Unavailable as error:
        log.warning("the store does not answer yet", reason=str(error))


async def end(gateway: Services) -> None:
    """What comes after the last request."""
    try:
        await meter(gateway)
    except KnapperError as error:
        log.warning("tokens that were sampled lately are not counted", reason=str(error))


async def meter(gateway: Services) -> None:
    """Write down how many tokens were sampled."""
    await gateway.meter.flush()


async def settle(gateway: Services) -> float | None:
    """Account for what runs have used, so that nobody reads their journals for it."""
    return _ACCOUNTS_OPEN_S if await gateway.accounts.settle() else _ACCOUNTS_REST_S


async def publish(gateway: Services) -> None:
    """Keep the catalogue at the models that are declared, where they are."""
    if gateway.declared is not None and (names := await gateway.declared.publish()):
        log.info("models are published", names=names)


async def collect(gateway: Services) -> float | None:
    """Delete what nothing needs any more; of sessions in which nothing has happened, ever more rarely looked for."""
    for sampler in gateway.samples.sampled_now():
        gateway.collector.ask(sampler)
    for run in gateway.bells.moved():
        gateway.collector.touch(session_of(run))
    if deleted := await gateway.collector.work():
        gateway.records.forget_samplers()
        log.info("garbage collected", sessions=len(deleted), objects=sum(deleted.values()))
    return gateway.collector.rest_s


async def parts_left(gateway: Services) -> None:
    """Delete parts of large objects whose writers died, and of uploads that no job has taken in time."""
    if count := await forget_torn_writes(gateway.store, gateway.clock()):
        log.info("parts of torn writes are deleted", objects=count)
    if gateway.place is not None and (count := await staging.expire(gateway.place.exchange, gateway.clock())):
        log.info("parts of unfinished uploads are deleted", parts=count)


async def tick(gateway: Services) -> None:
    gateway.samples.expire()
    for session in gateway.heartbeats.lapsed():
        log.info("session timed out: no heartbeat", session=session)
        gateway.samples.cancel_session(session, Gone(f"session {session} has not been heard of for too long"))
        for name in gateway.bells.runs():
            if session_of(name) == session:
                await gateway.bells.forget(name)  # from memory; a poll, or another request, brings it back
    undone = {run: far for run, far in gateway.bells.undone().items() if not gateway.bells.answered(run)}
    for name in gateway.waits.due(undone):
        await damage.unless(revive(gateway, name), None)
        gateway.waits.looked(name)


async def revive(gateway: Services, run: RunId) -> None:
    """Close the holes of a run whose client is gone or has waited long enough, and ring for whatever waits."""
    finished = await gateway.records.sessions.finished(session_of(run)) is not None
    filled = await gateway.acceptor.fill_holes(run, gateway.results.applied(run), finished)
    if filled:
        log.info("operations that never arrived are skipped", run=run, seqs=filled[:10], count=len(filled))
    if not gateway.bells.ringing(run):
        gateway.bells.ring(run)
