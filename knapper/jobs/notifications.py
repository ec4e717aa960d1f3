"""The doorbells of a job. Each says only which job and how far it is; the receiver looks into the store."""

import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace

from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs.names import Round, Start
from knapper.jobs.spec import decode
from knapper.state.job_records import Started

_QUIET_S = 10.0
_REMEMBERED_MAX = 4096


class Notifier:
    """Posts events to the Broker. Events may be lost or duplicated; nothing depends on one.

    The same doorbell is not posted again within ten seconds, or a Broker that duplicates events would cause ever more.
    """

    def __init__(self, post: Callable[[Event], Awaitable[object]], clock: Callable[[], float]) -> None:
        self._post = post
        self._clock = clock
        self._posted_at: dict[tuple[str, str, str], float] = {}

    async def ring(self, event: Event, what: str, source: str, n: int, kind: Round = "steps", moves: int = 0) -> None:
        """Post the doorbell after `event`: the round has got this far, or this version of the adapter exists.

        `moves`: how many turns, and answers to them, the round has.
        """
        doorbell = event.next(what, source, step=n)
        if kind == "evaluations" or moves:  # a step of the same number, or the turn before, may have its own
            own = f"{doorbell.id}|{kind}" + (f"|{moves}" if moves else "")
            doorbell = replace(doorbell, id=hashlib.sha256(own.encode()).hexdigest()[:32])
        key, now = (what, event.subject, f"{kind}/{n}/{moves}"), self._clock()
        if now - self._posted_at.get(key, -_QUIET_S) < _QUIET_S:
            return
        if len(self._posted_at) >= _REMEMBERED_MAX:
            self._posted_at = {known: at for known, at in self._posted_at.items() if now - at < _QUIET_S}
        self._posted_at[key] = now
        await self._post(doorbell)

    async def post(self, event: Event) -> None:
        """Post this very event."""
        await self._post(event)

    async def go_on(self, event: Event) -> None:
        """Post the same doorbell again, for the rest of the work."""
        await self._post(event.next(event.type, event.source, step=event.step))


def started(record: Started) -> Event:
    """The first doorbell of a job; its id is the start's, so that repetitions can be recognised."""
    start = f"{record.tenant}/{record.job}/{record.start}"
    kind = decode(record.spec_json).kind
    return Event(
        type=cloudevents.JOB_STARTED, subject=start, id=f"start-{record.start}", step=0, kind=kind, model=record.model
    )


def revived(record: Started, start: Start, what: str, step: int, when: int) -> Event:
    """A doorbell that may have been lost; `when` tells one revival from the next."""
    kind = decode(record.spec_json).kind
    event = Event(type=what, subject=str(start), id=f"revived-{start.id}-{when}", kind=kind, model=record.model)
    return event.next(what, "knapper/gateway", step=step)
