"""The bells of a job: who is rung next. Each says only which job and how far; whoever hears it looks into the store."""

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
    """Posts events to the Broker. What it posts is lost or doubled now and then, and nothing depends on it.

    The same bell is not posted again within ten seconds, or a Broker that doubles events would be answered by ever more
    of them.
    """

    def __init__(self, post: Callable[[Event], Awaitable[object]], clock: Callable[[], float]) -> None:
        self._post = post
        self._clock = clock
        self._rung: dict[tuple[str, str, str], float] = {}

    async def ring(self, event: Event, what: str, source: str, n: int, kind: Round = "steps") -> None:
        """The bell after `event`: this round is so far, or this version of the adapter there."""
        bell = event.next(what, source, step=n)
        if kind == "evaluations":  # of a step of the same number there may be another
            bell = replace(bell, id=hashlib.sha256(f"{bell.id}|{kind}".encode()).hexdigest()[:32])
        key, now = (what, event.subject, f"{kind}/{n}"), self._clock()
        if now - self._rung.get(key, -_QUIET_S) < _QUIET_S:
            return
        if len(self._rung) >= _REMEMBERED_MAX:
            self._rung = {known: at for known, at in self._rung.items() if now - at < _QUIET_S}
        self._rung[key] = now
        await self._post(bell)

    async def post(self, event: Event) -> None:
        """This very event."""
        await self._post(event)

    async def go_on(self, event: Event) -> None:
        """Ring the same bell again, for the rest of the work."""
        await self._post(event.next(event.type, event.source, step=event.step))


def started(record: Started) -> Event:
    """The first bell of a job; its id is the start's, so that repetitions are told."""
    start = f"{record.tenant}/{record.job}/{record.start}"
    kind = decode(record.spec_json).kind
    return Event(
        type=cloudevents.JOB_STARTED, subject=start, id=f"start-{record.start}", step=0, kind=kind, model=record.model
    )


def revived(record: Started, start: Start, what: str, step: int, when: int) -> Event:
    """A bell that may have been lost; `when` tells one revival from the next."""
    kind = decode(record.spec_json).kind
    event = Event(type=what, subject=str(start), id=f"revived-{start.id}-{when}", kind=kind, model=record.model)
    return event.next(what, "knapper/gateway", step=step)
