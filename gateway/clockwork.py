"""What happens by itself, every few seconds: forgotten bells, holes in the order of a run, clients that fell silent."""

import asyncio

import structlog

from gateway.parts import Parts
from knapper.errors import Gone, KnapperError
from knapper.ids import RunId, session_of

_TICK_S = 5.0

log = structlog.get_logger()


async def run(gateway: Parts) -> None:
    """Ticks for ever."""
    while True:
        await asyncio.sleep(_TICK_S)
        try:
            await tick(gateway)
        except KnapperError as error:  # the next tick tries again
            log.warning("tick failed", code=error.code, reason=str(error))


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
