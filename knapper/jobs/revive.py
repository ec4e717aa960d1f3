"""Bells that got lost: found by looking at the jobs that do not move, and rung again."""

from collections.abc import Awaitable
from dataclasses import dataclass, field

import structlog

from knapper import limits
from knapper.errors import KnapperError, UserError
from knapper.events import cloudevents
from knapper.events.cloudevents import Event
from knapper.jobs import control, notifications, progress
from knapper.jobs.inbox import look
from knapper.jobs.names import Start
from knapper.jobs.progress import Outline, ProgressReader
from knapper.jobs.services import JobServices
from knapper.jobs.spec import RlJob, decode
from knapper.state import damage
from knapper.state.job_records import Started, Waiting, read
from knapper.state.layout import ObjectKind

_QUIET_S = 60.0

log = structlog.get_logger()


@dataclass
class _Known:
    """A job at the last look: how far it was, and since when. `since` moves on with each bell."""

    started: Started
    moved: object
    since: float
    rung: bool = False  # nothing has moved since a bell


@dataclass
class Seen:
    """What a gateway remembers of the jobs between two looks.

    `lively`: a job has moved lately, so that it will soon be known whether it goes on. `awaiting`: files are awaited.
    """

    known: dict[Start, _Known] = field(default_factory=dict)
    looks: ProgressReader | None = None
    lively: bool = False
    awaiting: bool = False


async def due(place: JobServices, seen: Seen, quiet_s: float = _QUIET_S) -> list[Event]:
    """The bells for jobs with work undone that have not moved for so long; and first bells of jobs that start now."""
    found: list[Event] = []
    expected = await _starts(place, ObjectKind.JOB_EXPECTED)
    for start in expected:
        found += await _alone(start, _awaited(place, start))
    working = await _starts(place, ObjectKind.JOB_WORKING)
    seen.known = {start: known for start, known in seen.known.items() if start in working}
    for start in working:
        found += await _alone(start, _of(place, seen, start, quiet_s))
    now = place.clock()
    seen.awaiting = bool(expected)
    seen.lively = any(now - known.since < quiet_s and not known.rung for known in seen.known.values())
    return found


async def _alone(start: Start, bells: Awaitable[list[Event]]) -> list[Event]:
    """The bells of one job. What is wrong with it stops no other."""
    try:
        return await bells
    except damage.ERRORS as error:
        damage.report(error)
    except KnapperError as error:
        log.warning("a job cannot be looked at", job=str(start), code=error.code, reason=str(error))
    except Exception:
        log.exception("a job cannot be looked at: defect", job=str(start))
    return []


async def _starts(place: JobServices, kind: ObjectKind) -> list[Start]:
    def parse(name: str) -> Start:
        try:
            return Start.parse(name.removeprefix(kind.under()))
        except UserError as error:
            raise ValueError(name) from error

    return damage.parsed(await place.store.list(kind.under()), parse)


async def _awaited(place: JobServices, start: Start) -> list[Event]:
    """Look again; where nobody can, nothing is awaited any more after the time that files may take."""
    try:
        begun = await look(place, start.tenant, start.job)
    except Exception:
        waiting = await read(place.store, start.waiting, Waiting)
        if waiting is None or place.clock() - waiting.since >= limits.job_missing_s:
            await place.store.delete(start.expected)
        raise
    return [] if begun is None else [await first(place, begun)]


async def _of(place: JobServices, seen: Seen, start: Start, quiet_s: float) -> list[Event]:
    store = place.store
    before = seen.known.get(start)
    started = before.started if before is not None else await read(store, start.started, Started)
    if started is None:
        return await _unstarted(place, start)
    if not await control.runs(store, start):
        await store.delete(start.working)
        seen.known.pop(start, None)
        return []
    moved, now = await _moved(place, seen, start, started), place.clock()
    if before is None or before.moved != moved:
        seen.known[start] = before = _Known(started, moved, now)
    if now - before.since < quiet_s:
        return []
    seen.known[start] = _Known(started, moved, now, rung=True)
    return await again(place, started, start)


async def _moved(place: JobServices, seen: Seen, start: Start, started: Started) -> object:
    """Something that is another whenever the job has moved."""
    if seen.looks is None:
        seen.looks = ProgressReader(place.store)
    job = decode(started.spec_json)
    steps = job.steps if job.steps is not None else limits.job_steps_max
    now = await seen.looks.look(Outline(start, job, started.held_out), steps)
    parts = [(len(each.rollouts), len(each.scores), each.done) for each in now.rounds.values()]
    return now.trained, now.evaluated_to, parts


async def _unstarted(place: JobServices, start: Start) -> list[Event]:
    """Whoever was starting it died, or is about to be done."""
    begun = await look(place, start.tenant, start.job)
    await place.store.delete(start.working)
    if await place.store.get(start.started) is not None:
        await place.store.put_if_absent(start.working, b"")
    return [] if begun is None else [await first(place, begun)]


async def first(place: JobServices, start: Start) -> Event:
    """The bell that begins a started job."""
    started = await read(place.store, start.started, Started)
    assert started is not None, "the caller has seen it"
    return notifications.started(started)


async def again(place: JobServices, started: Started, start: Start) -> list[Event]:
    """The bells of whoever has something to do for the job."""
    when = int(place.clock() * 1e3)
    job = decode(started.spec_json)
    if not isinstance(job, RlJob):
        return [notifications.revived(started, start, cloudevents.JOB_STARTED, 0, when)]  # train_step is the only one
    outline = Outline(start, job, started.held_out)
    now = await ProgressReader(place.store).look(outline, job.steps)
    found: dict[str, int] = {}
    for kind, n, prompts in progress.rounds(outline, job, now):
        parts = now.parts(kind, n)
        if len(parts.rollouts) < prompts:
            found.setdefault(cloudevents.JOB_STARTED, now.trained)
        elif len(parts.scores) < prompts:
            found.setdefault(cloudevents.ROLLOUTS_SAMPLED, n)
        elif kind == "evaluations" or n == now.trained:
            found.setdefault(cloudevents.ROLLOUTS_SCORED, n)
    if progress.finished(outline, now, job.steps):
        found[cloudevents.ROLLOUTS_SCORED] = now.trained
    return [notifications.revived(started, start, what, n, when) for what, n in found.items()]
