"""Bells that got lost: found by looking at the jobs that do not move, and rung again."""

from dataclasses import dataclass, field

from knapper import events
from knapper.events import Event
from knapper.jobs import bells, control, progress
from knapper.jobs.names import Start
from knapper.jobs.place import Place
from knapper.jobs.progress import Looks, Outline
from knapper.jobs.records import Started, read
from knapper.jobs.spec import RlJob, decode
from knapper.jobs.start import look

_QUIET_S = 60.0


@dataclass
class Seen:
    """What a gateway remembers of the jobs between two ticks: how far each was, and since when."""

    since: dict[Start, tuple[object, float]] = field(default_factory=dict)


async def due(place: Place, seen: Seen, quiet_s: float = _QUIET_S) -> list[Event]:
    """The bells for jobs with work undone that have not moved for so long; and first bells of jobs that start now."""
    found: list[Event] = []
    for name in await place.store.list("expected/"):
        start = Start.parse(name.removeprefix("expected/"))
        if (begun := await look(place, start.tenant, start.job)) is not None:
            found.append(await first(place, begun))
    working = [Start.parse(name.removeprefix("working/")) for name in await place.store.list("working/")]
    seen.since = {start: known for start, known in seen.since.items() if start in working}
    for start in working:
        found += await _of(place, seen, start, quiet_s)
    return found


async def _of(place: Place, seen: Seen, start: Start, quiet_s: float) -> list[Event]:
    store = place.store
    started = await read(store, start.started, Started)
    if started is None:
        return await _unstarted(place, start)
    if not await control.runs(store, start):
        await store.delete(start.working)
        return []
    known, now = seen.since.get(start), place.clock()
    size = len(await store.list(start.prefix))  # nothing that a job writes is ever deleted while it runs
    if known is None or known[0] != size:
        known = seen.since[start] = (size, now)
    if now - known[1] < quiet_s:
        return []
    seen.since[start] = (size, now)
    return await again(place, started, start)


async def _unstarted(place: Place, start: Start) -> list[Event]:
    """Whoever was starting it died, or is about to be done."""
    begun = await look(place, start.tenant, start.job)
    await place.store.delete(start.working)
    if await place.store.get(start.started) is not None:
        await place.store.put_if_absent(start.working, b"")
    return [] if begun is None else [await first(place, begun)]


async def first(place: Place, start: Start) -> Event:
    """The bell that begins a started job."""
    started = await read(place.store, start.started, Started)
    assert started is not None, "the caller has seen it"
    return bells.started(started)


async def again(place: Place, started: Started, start: Start) -> list[Event]:
    """The bells of whoever has something to do for the job."""
    when = int(place.clock() * 1e3)
    job = decode(started.spec_json)
    if not isinstance(job, RlJob):
        return [bells.revived(started, start, events.JOB_STARTED, 0, when)]  # train_step is the only one
    outline = Outline(start, job, started.held_out)
    now = await Looks(place.store).look(outline, job.steps)
    found: dict[str, int] = {}
    for kind, n, prompts in progress.rounds(outline, job, now):
        parts = now.parts(kind, n)
        if len(parts.rollouts) < prompts:
            found.setdefault(events.JOB_STARTED, now.trained)
        elif len(parts.scores) < prompts:
            found.setdefault(events.ROLLOUTS_SAMPLED, n)
        elif kind == "evaluations" or n == now.trained:
            found.setdefault(events.ROLLOUTS_SCORED, n)
    if progress.finished(outline, now, job.steps):
        found[events.ROLLOUTS_SCORED] = now.trained
    return [bells.revived(started, start, what, n, when) for what, n in found.items()]
