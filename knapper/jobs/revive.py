"""Repeats lost doorbells: notifies again the jobs that make no progress."""

from collections.abc import Awaitable
from dataclasses import dataclass, field

import structlog

from knapper import limits
from knapper.errors import KnapperError, QuotaUsedUp, UserError
from knapper.events.cloudevents import Event
from knapper.jobs import bells, control, names, notifications, outputs
from knapper.jobs.inbox import look
from knapper.jobs.names import Start
from knapper.jobs.progress import Outline, ProgressReader
from knapper.jobs.services import JobServices
from knapper.jobs.spec import AnyJob, DpoJob, decode
from knapper.jobs.sweep import dispatch, halt, trials
from knapper.state import damage
from knapper.state.job_records import Started, Waiting, read
from knapper.state.layout import ObjectKind

_QUIET_S = 60.0

log = structlog.get_logger()


@dataclass
class _Known:
    """A job's progress at the last look, and since when it is unchanged; each doorbell resets `since`."""

    started: Started
    position: object
    since: float
    notified: bool = False  # no progress since a doorbell


@dataclass
class Seen:
    """What a gateway remembers about jobs between two looks.

    `lively`: a job made progress recently, so the next look comes soon. `awaiting`: some job waits for files. `paused`:
    one waits for its tenant's quota. `broker_began`: the Broker began with this process, as under `knapper up`, and has
    no event of before: the first look notifies each job that runs.
    """

    broker_began: bool = False

    known: dict[Start, _Known] = field(default_factory=dict)
    progress_reader: ProgressReader | None = None
    lively: bool = False
    awaiting: bool = False
    paused: bool = False


async def due(services: JobServices, seen: Seen, quiet_s: float = _QUIET_S) -> list[Event]:
    """Doorbells for jobs with open work and no progress for `quiet_s`, and the first ones of jobs that start now."""
    events: list[Event] = []
    seen.paused = False
    expected = await _starts(services, ObjectKind.JOB_EXPECTED)
    for start in expected:
        events += await _alone(start, _awaited(services, start))
    working = await _starts(services, ObjectKind.JOB_WORKING)
    seen.known = {start: known for start, known in seen.known.items() if start in working}
    for start in working:
        events += await _alone(start, _stalled(services, seen, start, quiet_s))
    now = services.clock()
    seen.broker_began = False
    seen.awaiting = bool(expected)
    seen.lively = any(now - known.since < quiet_s and not known.notified for known in seen.known.values())
    return events


async def _alone(start: Start, events: Awaitable[list[Event]]) -> list[Event]:
    """The doorbells of one job. An error in one job stops no other."""
    try:
        return await events
    except damage.ERRORS as error:
        damage.report(error)
    except KnapperError as error:
        log.warning("a job cannot be checked", job=str(start), code=error.code, reason=str(error))
    except Exception:
        log.exception("a job cannot be checked: defect", job=str(start))
    return []


async def _starts(services: JobServices, kind: ObjectKind) -> list[Start]:
    def parse(name: str) -> Start:
        try:
            return Start.parse(name.removeprefix(kind.under()))
        except UserError as error:
            raise ValueError(name) from error

    return damage.parsed(await services.store.list(kind.under()), parse)


async def _awaited(services: JobServices, start: Start) -> list[Event]:
    """Look again. If looking fails, stop waiting once the time for files is over."""
    try:
        begun = await look(services, start.tenant, start.job)
    except Exception:
        waiting = await read(services.store, start.waiting, Waiting)
        if waiting is None or services.clock() - waiting.since >= limits.job_missing_s:
            await services.store.delete(start.expected)
        raise
    return [] if begun is None else await first(services, begun)


async def _stalled(services: JobServices, seen: Seen, start: Start, quiet_s: float) -> list[Event]:
    store = services.store
    before = seen.known.get(start)
    started = before.started if before is not None else await read(store, start.started, Started)
    if started is None:
        return await _unstarted(services, start)
    job = decode(started.spec_json)
    if not await _may_run(services, start, started, job):
        await store.delete(start.working)
        seen.known.pop(start, None)
        return []
    if job.sweep is not None:
        rung = await dispatch.advance(services, start)
        seen.known[start] = _since(before, started, len(await store.list(start.trials)), services.clock())
        return rung
    paused = (await control.now(store, start)).reason.startswith(control.PAUSED)
    if paused and not await _has_quota(services, start, started):
        seen.paused = True
        return []
    position, now = await _position(services, seen, start, started), services.clock()
    if paused:
        before = _Known(started, position, float("-inf"))
    seen.known[start] = before = _since(before, started, position, now)
    if now - before.since < quiet_s and not seen.broker_began:
        return []
    seen.known[start] = _Known(started, position, now, notified=True)
    return await bells.again(services, started, start)


async def _may_run(services: JobServices, start: Start, started: Started, job: AnyJob) -> bool:
    """Whether the job runs, and its sweep, if it is a trial; ends what must not go on without it."""
    sweep = trials.of_trial(start, started)
    if sweep is not None and not await control.runs(services.store, sweep):
        await halt.trial(services, start)
    runs = await control.runs(services.store, start)
    if not runs and job.sweep is not None:
        await halt.all_trials(services, start)
    return runs


def _since(before: _Known | None, started: Started, position: object, now: float) -> _Known:
    return before if before is not None and before.position == position else _Known(started, position, now)


async def _has_quota(services: JobServices, start: Start, started: Started) -> bool:
    """Whether the quota of its tenant lets a paused job go on."""
    runs = [start.run, start.reference] if isinstance(decode(started.spec_json), DpoJob) else [start.run]
    try:
        await services.quota.expect(start.tenant, services.clock())
        if await services.store.get(start.trained(0)) is None:
            await services.quota.expect_runs(start.tenant, runs)
    except QuotaUsedUp:
        return False
    if await control.note(services.store, start, "", services.clock()):
        await outputs.publish_status(services, started)
    return True


async def _position(services: JobServices, seen: Seen, start: Start, started: Started) -> object:
    """A value that changes whenever the job makes progress."""
    if seen.progress_reader is None:
        seen.progress_reader = ProgressReader(services.store)
    job = decode(started.spec_json)
    steps = job.steps if job.steps is not None else limits.job_steps_max
    now = await seen.progress_reader.look(Outline(start, job, started.held_out), steps)
    parts = [(len(parts.rollouts), len(parts.scores), parts.moves, parts.done) for parts in now.rounds.values()]
    return now.trained, now.evaluated_to, parts


async def _unstarted(services: JobServices, start: Start) -> list[Event]:
    """The process that was starting the job died, or is about to finish. A trial's job is begun by its sweep again."""
    begun = None if names.sweep_of(start.job) else await look(services, start.tenant, start.job)
    await services.store.delete(start.working)
    if await services.store.get(start.started) is not None:
        await services.store.put_if_absent(start.working, b"")
    return [] if begun is None else await first(services, begun)


async def first(services: JobServices, start: Start) -> list[Event]:
    """The doorbell that begins a started job; of a sweep, those of its first trials."""
    started = await read(services.store, start.started, Started)
    assert started is not None, "the caller has seen it"
    if decode(started.spec_json).sweep is not None:
        return await dispatch.advance(services, start)
    return [notifications.started(started)]
