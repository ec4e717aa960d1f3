"""The beginning of a job: files that somebody put into the inbox, in any order, become one start, exactly once.

Every upload makes somebody look. What is complete and right is copied into the store, as it is at this moment, and the
record `started` is written last. What is wrong is said beside job.yaml, and looked at again with the next upload.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import structlog

from knapper import limits
from knapper.catalogue.served_models import Catalogue
from knapper.errors import InvalidField, NotFound, TooLarge, UserError
from knapper.ids import Tenant, number
from knapper.jobs import control, datasets, names, outputs, spec, upload
from knapper.jobs.names import Start
from knapper.jobs.rows import RlRow, Row
from knapper.jobs.services import JobServices
from knapper.jobs.spec import Parsed, RlJob
from knapper.jobs.upload import Content, Upload
from knapper.jobs.yaml_document import JobError
from knapper.rewards import plain
from knapper.rewards import spec as rewards
from knapper.rewards.spec import Reward
from knapper.state import layout
from knapper.state.job_records import Refusal, Started, Waiting, encode, read
from knapper.state.layout import ObjectKind, last_number
from knapper.state.model_record import slug

log = structlog.get_logger()


async def look(place: JobServices, tenant: Tenant, job: str) -> Start | None:
    """Start the job of this folder if everything is there, and this content was not started before; return the start.

    The caller rings `dev.knapper.job.started` for it; `revive` does if that gets lost. Safe to call at any time, by
    any number of processes at once.
    """
    names.job(job)
    # First: what is current later was not awaited before.
    awaited = await place.store.list(ObjectKind.JOB_EXPECTED.under(tenant, job))
    seen = await _look(place, tenant, job)
    for name in awaited:  # by a job.yaml that another took the place of, or nobody; or everything has come
        if seen.awaits is None or name != seen.awaits.expected:
            await place.store.delete(name)
    return seen.begun


async def again(place: JobServices, tenant: Tenant, job: str) -> Start | None:
    """Start the folder's content once more, although it was started before and nothing changed.

    None if it cannot be started, as `look` has it. Raises InvalidField while it runs.
    """
    whole = await _whole(place, tenant, names.job(job))
    start = None if whole is None else await upload.current(place.store, whole.content)
    if whole is not None and start is not None and await place.store.get(start.started) is not None:
        if await control.runs(place.store, start):
            raise InvalidField("again", True, "for a job that has ended", "It runs; cancel it first")
        await upload.repeat(place.store, whole.content)
    return await look(place, tenant, job)


async def was_started(place: JobServices, tenant: Tenant, job: str, yaml: bytes, sha256s: Mapping[str, str]) -> bool:
    """Whether a job of just this job.yaml and these files was started, under this name."""
    try:
        parsed = spec.parse(yaml)
    except UserError:
        return False
    sent = Content(tenant, job, yaml, {name: sha256s[name] for name in parsed.job.files if name in sha256s})
    return await place.store.get((await upload.current(place.store, sent)).started) is not None


async def _whole(place: JobServices, tenant: Tenant, job: str) -> Upload | None:
    """What lies in the folder; None if nobody can tell what belongs to it."""
    try:
        found = await upload.job_yaml(place, tenant, job)
        return None if found is None else await upload.read_files(place, tenant, job, found, spec.parse(found.data))
    except UserError:
        return None


@dataclass(frozen=True)
class _Seen:
    """`begun`: by this look. `awaits`: what stands for a job.yaml whose files are not all there."""

    begun: Start | None = None
    awaits: Start | None = None


async def _look(place: JobServices, tenant: Tenant, job: str) -> _Seen:
    try:
        found = await upload.job_yaml(place, tenant, job)
    except TooLarge as error:  # all that are too large share one start that never is
        await _refuse(place, Start.of(tenant, job, "too large"), _as_job_error(error))
        return _Seen()
    if found is None:
        return _Seen()
    start, parsed = upload.of_job_yaml(tenant, job, found.data), None
    try:
        parsed = spec.parse(found.data)
        whole = await upload.read_files(place, tenant, job, found, parsed)
        missing = [name for name in parsed.job.files if name not in whole.files]
        if missing:
            return _Seen(awaits=start if await _wait(place, start, parsed, missing) else None)
        start = await upload.current(place.store, whole.content)
        if (await control.now(place.store, start)).state == "deleted":
            start = await upload.repeat(place.store, whole.content)
        elif await place.store.get(start.started) is not None:
            if not await _was_replaced(place, start, whole):
                await _make_current(place, start)
                return _Seen()
            start = await upload.repeat(place.store, whole.content)
        started = await _checked(place, start, parsed, whole)
    except UserError as error:
        await _refuse(place, start, parsed.wrong(error) if parsed is not None else _as_job_error(error))
        return _Seen()
    return _Seen(begun=start if await _begin(place, start, started, whole) else None)


async def _was_replaced(place: JobServices, start: Start, whole: Upload) -> bool:
    """Whether other content ended this start, and this one has come back since.

    What lies there is read once more: the look that found it may have begun before the other content came.
    """
    now = await control.now(place.store, start)
    if now.state != "cancelled" or not now.reason.startswith(control.REPLACED):
        return False
    there = await _whole(place, start.tenant, start.job)
    if there is None or there.job_yaml.data != whole.job_yaml.data:
        return False
    return there.content.sha256s == whole.content.sha256s


async def _make_current(place: JobServices, start: Start) -> None:
    """What lies in the folder is this start again, after something that was refused: people see it, and no error."""
    listed = await place.store.list(ObjectKind.TENANT_START.under(start.tenant, start.job))
    if listed and not listed[-1].endswith(f"/{start.id}"):
        await _list_now(place, start)
        await place.exchange.remove(f"{layout.inbox(start.tenant, start.job)}{names.JOB_ERROR}")


async def _checked(place: JobServices, start: Start, parsed: Parsed, whole: Upload) -> Started:
    """The record of the start. Raises UserError for whatever can be found wrong before it."""
    files = {name: blob.data for name, blob in whole.files.items()}
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
        tenant=start.tenant, job=start.job, start=start.id, generation=whole.job_yaml.generation,
        generations=whole.generations, spec_json=spec.encode(job), job_yaml=whole.job_yaml.data,
        files=dict(whole.content.sha256s),
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


async def _model(place: JobServices, asked: str | None) -> str:
    """The served name. Raises InvalidField."""
    served = [model for model in await Catalogue(place.store).models() if model.trainable and model.sampleable]
    if asked is None and len(served) == 1:
        return served[0].name
    for model in served:
        if asked in (model.name, model.directory):
            return model.name
    shown = ", ".join(model.name for model in served) or "none is served at this moment"
    raise InvalidField("base_model", asked, shown)


async def _begin(place: JobServices, start: Start, started: Started, whole: Upload) -> bool:
    store = place.store
    for name, blob in whole.files.items():
        await store.put_if_absent(start.content(started.files[name]), blob.data)
    await _list(place, start)
    await store.put_if_absent(start.working, b"")
    await _end_earlier(place, start)
    won = await store.put_if_absent(start.started, encode(started))
    await store.put_if_absent(start.working, b"")  # again: `revive` clears away what never started
    if not won:
        return False
    await place.exchange.remove(f"{layout.inbox(start.tenant, start.job)}{names.JOB_ERROR}")
    job = spec.decode(started.spec_json)
    log.info("job started", job=str(start), kind=job.kind, rows=started.rows, adapts=",".join(job.lora.adapts))
    await outputs.publish_status(place, started)
    return True


async def _end_earlier(place: JobServices, start: Start) -> None:
    """Earlier starts of the same job would write over each other's results."""
    for name in await place.store.list(ObjectKind.JOB_WORKING.under(start.tenant, start.job)):
        other = Start(start.tenant, start.job, name.rpartition("/")[2])
        if other != start and await place.store.get(other.started) is not None:
            reason = f"{control.REPLACED}: start {start.id} took its place"
            if await control.change(place.store, other, "cancelled", reason, place.clock()):
                await place.store.delete(other.working)


async def _list(place: JobServices, start: Start) -> None:
    """Into the tenant's lists: once, or once more if somebody dies here, which changes nothing."""
    if await place.store.get(start.listed) is None:
        await _list_now(place, start)
        await place.store.put_if_absent(start.listed, b"")


async def _list_now(place: JobServices, start: Start) -> None:
    at = int(place.clock() * 1e6)
    await place.store.put_if_absent(ObjectKind.TENANT_START.key(start.tenant, start.job, at, start.id), b"")
    await place.store.put_if_absent(ObjectKind.TENANT_JOB.key(start.tenant, at, start.job, start.id), b"")


async def _wait(place: JobServices, start: Start, parsed: Parsed, missing: list[str]) -> bool:
    """Files may come in any order. False once they took too long, which is said: then only uploads lead to a look."""
    now = place.clock()
    await _list(place, start)
    waiting = await read(place.store, start.waiting, Waiting)
    if waiting is None:  # nothing is written by those who look again
        waiting = Waiting(since=now)
        await place.store.put_if_absent(start.expected, b"")
        await place.store.put_if_absent(start.waiting, encode(waiting))
        log.info("job waits for files", job=str(start), missing=missing)
    if now - waiting.since < limits.job_missing_s:
        return True
    field = next(field for field, name in _fields(parsed) if name in missing)
    todo = f"Upload {', '.join(missing)} beside job.yaml: the job starts as soon as all are there"
    allowed = f"a file that is there within {limits.job_missing_s / 60:.0f} minutes"
    await _refuse(place, start, parsed.wrong(InvalidField(field, missing[0], allowed, todo)))
    return False


def _fields(parsed: Parsed) -> list[tuple[str, str]]:
    """(field, file) of all that job.yaml names."""
    job = parsed.job
    fields = [("data", job.data)]
    if job.evaluate is not None:
        fields.append(("evaluate.data", job.evaluate.data))
    return fields + [("reward", name) for name in job.files if name not in {file for _, file in fields}]


async def _refuse(place: JobServices, start: Start, error: JobError) -> None:
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
    beside = f"{layout.inbox(start.tenant, start.job)}{names.JOB_ERROR}"
    if not await _lies_there(place, beside, data):
        await place.exchange.publish(beside, data)


async def _lies_there(place: JobServices, name: str, data: bytes) -> bool:
    try:
        found = await place.exchange.read(name, len(data))
    except TooLarge:
        return False
    return found is not None and found.data == data


def _as_job_error(error: UserError) -> JobError:
    return error if isinstance(error, JobError) else JobError(1, "job.yaml", None, "", message=str(error))


async def started(place: JobServices, start: Start) -> Started:
    """Raises NotFound."""
    found = await read(place.store, start.started, Started)
    if found is None:
        raise NotFound(f"job {start} was not started; put job.yaml and its files into {start.tenant}'s inbox")
    return found
