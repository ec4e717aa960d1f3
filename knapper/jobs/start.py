"""The beginning of a job: files that somebody put into the inbox, in any order, become one start, exactly once.

Every upload makes somebody look. What is complete and right is copied into the store, as it is at this moment, and the
record `started` is written last. What is wrong is said beside job.yaml, and looked at again with the next upload.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence

import msgspec
import structlog

from knapper import limits
from knapper.errors import InvalidField, NotFound, TooLarge, UserError
from knapper.ids import Tenant, number
from knapper.jobs import control, datasets, names, spec
from knapper.jobs.datasets import RlRow, Row
from knapper.jobs.documents import JobError
from knapper.jobs.names import Start
from knapper.jobs.place import Place
from knapper.jobs.records import Refusal, Started, Waiting, encode, read
from knapper.jobs.spec import Parsed, RlJob
from knapper.journal.names import last_number
from knapper.models.catalogue import Catalogue, slug
from knapper.rewards import plain
from knapper.rewards import spec as rewards
from knapper.rewards.spec import Reward

log = structlog.get_logger()


async def look(place: Place, tenant: Tenant, job: str) -> Start | None:
    """Start the job of this folder if everything is there, and it was not started before; then return the start.

    The caller rings `dev.knapper.job.started` for it; `revive` does if that gets lost. Safe to call at any time, by
    any number of processes at once.
    """
    inbox = names.inbox(tenant, names.job(job))
    awaited = await place.store.list(names.awaited(tenant, job))  # first: what is current later was not awaited before
    try:
        found = await place.exchange.read(f"{inbox}{names.JOB_YAML}", limits.job_yaml_bytes_max)
    except TooLarge as error:  # its generation is not known: all that are too large share one start that never is
        await _forget(place, awaited)
        await _refuse(place, Start.of(tenant, job, "too large"), _as_job_error(error))
        return None
    if found is None:
        await _forget(place, awaited)
        return None
    start = Start.of(tenant, job, found.generation)
    await _forget(place, [name for name in awaited if name != start.expected])
    if await place.store.get(start.started) is not None:
        return None
    parsed: Parsed | None = None
    try:
        parsed = spec.parse(found.data)
        files = await _files(place, inbox, parsed)
        missing = [name for name in parsed.job.files if name not in files]
        if missing:
            await _wait(place, start, parsed, missing)
            return None
        started = await _checked(place, start, parsed, files, found.generation, found.data)
    except UserError as error:
        await _refuse(place, start, parsed.wrong(error) if parsed is not None else _as_job_error(error))
        return None
    return start if await _begin(place, start, started, files) else None


async def _forget(place: Place, awaited: Sequence[str]) -> None:
    """Nothing is awaited for a job.yaml that another took the place of, or nobody."""
    for name in awaited:
        await place.store.delete(name)


async def _files(place: Place, inbox: str, parsed: Parsed) -> dict[str, bytes]:
    """Those that are there. Raises TooLarge."""
    found = {}
    for name in parsed.job.files:
        blob = await place.exchange.read(f"{inbox}{names.file(name)}", limits.job_file_bytes_max)
        if blob is not None:
            found[name] = blob.data
    return found


async def _checked(
    place: Place, start: Start, parsed: Parsed, files: Mapping[str, bytes], generation: str, job_yaml: bytes
) -> Started:
    """The record of the start. Raises UserError for whatever can be found wrong before it."""
    job = parsed.job
    rows = await asyncio.to_thread(datasets.rows, job, job.data, files[job.data])
    held_out: Sequence[Row] = []
    if job.evaluate is not None:
        held_out = await asyncio.to_thread(datasets.rows, job, job.evaluate.data, files[job.evaluate.data])
    if isinstance(job, RlJob):
        reward = _reward(job, files)
        await asyncio.to_thread(_check_answers, reward, job.data, files[job.data], rows)
        if job.evaluate is not None:
            await asyncio.to_thread(_check_answers, reward, job.evaluate.data, files[job.evaluate.data], held_out)
    model = await _model(place, job.base_model)
    return Started(
        tenant=start.tenant, job=start.job, start=start.id, generation=generation, spec_json=spec.encode(job),
        job_yaml=job_yaml, files={name: _sha256(data) for name, data in files.items()},
        files_bytes=sum(map(len, files.values())), base_model=model, model=slug(model), rows=len(rows),
        held_out=len(held_out), started_at=place.clock(),
    )  # fmt: skip


def _reward(job: RlJob, files: Mapping[str, bytes]) -> Reward:
    try:
        return rewards.parse(job.reward, files)
    except UserError as error:
        error.field = error.field or "reward"
        raise


def _check_answers(reward: Reward, name: str, data: bytes, rows: Sequence[Row]) -> None:
    """Raises JobError for the first row whose answer a term can compare nothing with."""
    for n, row in enumerate(rows):
        assert isinstance(row, RlRow), "the job is one of rl"
        for term in reward.terms.values():
            try:
                plain.check(term, row.answer)
            except UserError as error:
                line = datasets.line_of(name, data, n)
                raise JobError(line, "answer", row.answer, "", file=name, message=str(error)) from error


async def _model(place: Place, asked: str | None) -> str:
    """The served name. Raises InvalidField."""
    served = [model for model in await Catalogue(place.store).models() if model.trainable and model.sampleable]
    if asked is None and len(served) == 1:
        return served[0].name
    for model in served:
        if asked in (model.name, model.directory):
            return model.name
    shown = ", ".join(model.name for model in served) or "none is served at this moment"
    raise InvalidField("base_model", asked, shown)


async def _begin(place: Place, start: Start, started: Started, files: Mapping[str, bytes]) -> bool:
    store = place.store
    for name, data in files.items():
        await store.put_if_absent(start.content(started.files[name]), data)
    await _list(place, start)
    await store.put_if_absent(start.working, b"")
    await _end_earlier(place, start)
    won = await store.put_if_absent(start.started, encode(started))
    await store.put_if_absent(start.working, b"")  # again: `revive` clears away what never started
    await store.delete(start.expected)
    if not won:
        return False
    await place.exchange.remove(f"{names.inbox(start.tenant, start.job)}{names.JOB_ERROR}")
    log.info("job started", job=str(start), kind=spec.decode(started.spec_json).kind, rows=started.rows)
    return True


async def _end_earlier(place: Place, start: Start) -> None:
    """Earlier starts of the same job would write over each other's results."""
    for name in await place.store.list(f"working/{start.tenant}/{start.job}/"):
        other = Start(start.tenant, start.job, name.rpartition("/")[2])
        if other != start and await place.store.get(other.started) is not None:
            reason = f"{control.REPLACED}: start {start.id} took its place"
            if await control.change(place.store, other, "cancelled", reason, place.clock()):
                await place.store.delete(other.working)


async def _list(place: Place, start: Start) -> None:
    """Into the tenant's lists: once, or once more if somebody dies here, which changes nothing."""
    marker = f"{start.prefix}listed"
    if await place.store.get(marker) is None:
        at = number(int(place.clock() * 1e6))
        await place.store.put_if_absent(f"{names.starts(start.tenant, start.job)}{at}/{start.id}", b"")
        await place.store.put_if_absent(f"{names.listed(start.tenant)}{at}/{start.job}/{start.id}", b"")
        await place.store.put_if_absent(marker, b"")


async def _wait(place: Place, start: Start, parsed: Parsed, missing: list[str]) -> None:
    """Files may come in any order; when they take too long it is said."""
    now = place.clock()
    await _list(place, start)
    waiting = await read(place.store, start.waiting, Waiting)
    if waiting is None:  # nothing is written by those who look again
        waiting = Waiting(since=now)
        await place.store.put_if_absent(start.expected, b"")
        await place.store.put_if_absent(start.waiting, encode(waiting))
    if now - waiting.since >= limits.job_missing_s:
        field = next(field for field, name in _fields(parsed) if name in missing)
        todo = f"Upload {', '.join(missing)} beside job.yaml: the job starts as soon as all are there"
        allowed = f"a file that is there within {limits.job_missing_s / 60:.0f} minutes"
        await _refuse(place, start, parsed.wrong(InvalidField(field, missing[0], allowed, todo)))


def _fields(parsed: Parsed) -> list[tuple[str, str]]:
    """(field, file) of all that job.yaml names."""
    job = parsed.job
    fields = [("data", job.data)]
    if job.evaluate is not None:
        fields.append(("evaluate.data", job.evaluate.data))
    return fields + [("reward", name) for name in job.files if name not in {file for _, file in fields}]


async def _refuse(place: Place, start: Start, error: JobError) -> None:
    """Say what is wrong: beside job.yaml, in the list of jobs, in the log."""
    await _list(place, start)
    report = error.report()
    listed = await place.store.list(start.refusals)
    newest = await read(place.store, listed[-1], Refusal) if listed else None
    if newest is None or newest.report != report:
        n = last_number(listed[-1]) if listed else 0
        refusal = Refusal(report=report, at=place.clock())
        await place.store.put_if_absent(f"{start.refusals}{number(n + 1)}", encode(refusal))
        log.error("job refused", job=str(start), reason=str(error))
    data = msgspec.json.format(msgspec.json.encode(report)) + b"\n"
    beside = f"{names.inbox(start.tenant, start.job)}{names.JOB_ERROR}"
    if not await _lies_there(place, beside, data):
        await place.exchange.publish(beside, data)
    await place.store.delete(start.expected)  # from now on only uploads make anybody look


async def _lies_there(place: Place, name: str, data: bytes) -> bool:
    try:
        found = await place.exchange.read(name, len(data))
    except TooLarge:
        return False
    return found is not None and found.data == data


def _as_job_error(error: UserError) -> JobError:
    return error if isinstance(error, JobError) else JobError(1, "job.yaml", None, "", message=str(error))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def started(place: Place, start: Start) -> Started:
    """Raises NotFound."""
    found = await read(place.store, start.started, Started)
    if found is None:
        raise NotFound(f"job {start} was not started; put job.yaml and its files into {start.tenant}'s inbox")
    return found
