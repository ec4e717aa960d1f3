"""What happens by itself: forgotten bells, holes in the order of a run, clients that fell silent, files left over."""

from functools import partial

import structlog

from gateway.chores import Chore
from gateway.parts import Parts
from knapper.errors import Gone, KnapperError, Unavailable
from knapper.ids import RunId, session_of
from knapper.jobs.revive import due

_TICK_S = 5.0
_JOBS_S = 5.0
_METER_S = 60.0
_SWEEP_S = 600.0

log = structlog.get_logger()


def chores(gateway: Parts) -> list[Chore]:
    """All of it, but for uploads."""
    paces = [(publish, _TICK_S), (tick, _TICK_S), (jobs, _JOBS_S), (meter, _METER_S), (sweep, _SWEEP_S)]
    return [Chore(work.__name__, partial(work, gateway), every_s) for work, every_s in paces]


async def jobs(gateway: Parts) -> None:
    """Ring again for jobs that do not move, and start those whose files are all there now."""
    if gateway.place is not None:
        for bell in await due(gateway.place, gateway.seen_jobs, gateway.job_quiet_s):
            log.info("a job is rung for again", job=bell.subject, type=bell.type, step=bell.step)
            await gateway.place.bells.post(bell)


async def begin(gateway: Parts) -> None:
    """What comes before the first request. Raises InvalidField; a store that does not answer yet is asked again."""
    try:
        await publish(gateway)
    except Unavailable as error:
        log.warning("models are not published yet", reason=str(error))


async def end(gateway: Parts) -> None:
    """What comes after the last request."""
    try:
        await meter(gateway)
    except KnapperError as error:
        log.warning("tokens that were sampled lately are not counted", reason=str(error))


async def meter(gateway: Parts) -> None:
    """Write down how many tokens were sampled."""
    await gateway.meter.flush()


async def publish(gateway: Parts) -> None:
    """Keep the catalogue at the models that are declared, where they are."""
    if gateway.declared is not None and (names := await gateway.declared.publish()):
        log.info("models are published", names=names)


async def sweep(gateway: Parts) -> None:
    """Delete the files of checkpoints that have gone, once nothing needs them."""
    for bundle in await gateway.orphans.sweep():
        log.info("files that nothing leads to are deleted", bundle=bundle)


async def tick(gateway: Parts) -> None:
    gateway.samples.expire()
    for session in gateway.heartbeats.lapsed():
        log.info("session fell silent", session=session)
        gateway.samples.cancel_session(session, Gone(f"session {session} has not been heard of for too long"))
        for name in gateway.bells.runs():
            if session_of(name) == session:
                await gateway.bells.forget(name)  # from memory; a poll, or another request, brings it back
    for name in gateway.bells.undone():
        await revive(gateway, name)


async def revive(gateway: Parts, run: RunId) -> None:
    """Close the holes of a run whose client is gone or has waited long enough, and ring for whatever waits."""
    finished = await gateway.records.sessions.finished(session_of(run)) is not None
    filled = await gateway.acceptor.fill_holes(run, gateway.results.applied(run), finished)
    if filled:
        log.info("operations that never arrived are skipped", run=run, seqs=filled[:10], count=len(filled))
    if not gateway.bells.ringing(run):
        gateway.bells.ring(run)
