"""The beginning of a job: files uploaded into the inbox, in any order, become one start, exactly once.

Every upload leads to a look. A complete and valid folder is copied into the store as it is at this moment, and the
record `started` is written last. An error is reported beside job.yaml, and the next upload leads to another look.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import structlog

from knapper import limits
from knapper.errors import InvalidField, TooLarge, UserError
from knapper.ids import Tenant, number
from knapper.jobs import checks, control, names, spec, starts, upload
from knapper.jobs.names import Start
from knapper.jobs.services import JobServices
from knapper.jobs.spec import Parsed, RlJob
from knapper.jobs.upload import Content, Upload
from knapper.jobs.yaml_document import JobError
from knapper.state import layout
from knapper.state.job_records import Refusal, Waiting, encode, read
from knapper.state.layout import ObjectKind, last_number

log = structlog.get_logger()


async def look(services: JobServices, tenant: Tenant, job: str) -> Start | None:
    """Start the job of this folder if everything is there, and this content was not started before; return the start.

    The caller posts `dev.knapper.job.started` for it; `revive` repeats it if it gets lost. Safe to call at any time, by
    any number of processes at once.
    """
    names.chosen(job)
    # First, so that a start that becomes current later was not awaited before.
    awaited = await services.store.list(ObjectKind.JOB_EXPECTED.under(tenant, job))
    seen = await _look(services, tenant, job)
    for name in awaited:  # of a replaced job.yaml, or all its files have arrived
        if seen.awaits is None or name != seen.awaits.expected:
            await services.store.delete(name)
    return seen.begun


async def again(services: JobServices, tenant: Tenant, job: str) -> Start | None:
    """Start the folder's content once more, although nothing changed since it was started.

    None if it cannot be started, as with `look`. Raises InvalidField while it runs.
    """
    whole = await _whole(services, tenant, names.chosen(job))
    start = None if whole is None else await upload.current(services.store, whole.content)
    if whole is not None and start is not None and await services.store.get(start.started) is not None:
        if await control.runs(services.store, start):
            raise InvalidField("again", True, "for a job that has ended", "It runs; cancel it first")
        await upload.repeat(services.store, whole.content)
    return await look(services, tenant, job)


async def was_started(services: JobServices, tenant: Tenant, job: str, yaml: bytes, sha256s: Mapping[str, str]) -> bool:
    """Whether a job of exactly this job.yaml and these files was started under this name."""
    try:
        parsed = spec.parse(yaml)
    except UserError:
        return False
    sent = Content(tenant, job, yaml, {name: sha256s[name] for name in parsed.files if name in sha256s})
    return await services.store.get((await upload.current(services.store, sent)).started) is not None


async def _whole(services: JobServices, tenant: Tenant, job: str) -> Upload | None:
    """The folder's content; None if there is no valid job.yaml."""
    try:
        job_yaml = await upload.job_yaml(services, tenant, job)
        if job_yaml is None:
            return None
        return await upload.read_files(services, tenant, job, job_yaml, spec.parse(job_yaml.data))
    except UserError:
        return None


@dataclass(frozen=True)
class _Seen:
    """`begun`: the start made by this look. `awaits`: the placeholder of a job.yaml whose files are incomplete."""

    begun: Start | None = None
    awaits: Start | None = None


async def _look(services: JobServices, tenant: Tenant, job: str) -> _Seen:
    try:
        job_yaml = await upload.job_yaml(services, tenant, job)
    except TooLarge as error:  # all oversized ones share one start, which never begins
        await _refuse(services, Start.of(tenant, job, "too large"), _as_job_error(error))
        return _Seen()
    if job_yaml is None:
        return _Seen()
    start, parsed = upload.of_job_yaml(tenant, job, job_yaml.data), None
    try:
        parsed = spec.parse(job_yaml.data)
        whole = await upload.read_files(services, tenant, job, job_yaml, parsed)
        missing = [name for name in parsed.files if name not in whole.files]
        if missing:
            return _Seen(awaits=start if await _wait(services, start, parsed, missing) else None)
        start = await upload.current(services.store, whole.content)
        if (await control.now(services.store, start)).state == "deleted":
            start = await upload.repeat(services.store, whole.content)
        elif await services.store.get(start.started) is not None:
            if not await _was_replaced(services, start, whole):
                await _make_current(services, start)
                return _Seen()
            start = await upload.repeat(services.store, whole.content)
        started = await checks.checked(services, start, parsed, whole)
    except UserError as error:
        await _refuse(services, start, parsed.wrong(error) if parsed is not None else _as_job_error(error))
        return _Seen()
    files = {name: blob.data for name, blob in whole.files.items()}
    return _Seen(begun=start if await starts.begin(services, start, started, files) else None)


async def _was_replaced(services: JobServices, start: Start, whole: Upload) -> bool:
    """Whether other content ended this start, and this content has come back since.

    The folder is read once more: the look that read it may have begun before the other content came.
    """
    now = await control.now(services.store, start)
    if now.state != "cancelled" or not now.reason.startswith(control.REPLACED):
        return False
    current = await _whole(services, start.tenant, start.job)
    if current is None or current.job_yaml.data != whole.job_yaml.data:
        return False
    return current.content.sha256s == whole.content.sha256s


async def _make_current(services: JobServices, start: Start) -> None:
    """The folder holds this start again, after a refused one: list it, and remove the error."""
    listed = await services.store.list(ObjectKind.TENANT_START.under(start.tenant, start.job))
    if listed and not listed[-1].endswith(f"/{start.id}"):
        await starts.list_now(services, start)
        await services.exchange.remove(f"{layout.inbox(start.tenant, start.job)}{names.JOB_ERROR}")


async def _wait(services: JobServices, start: Start, parsed: Parsed, missing: list[str]) -> bool:
    """Wait for files, which may come in any order. False after too long: refuse, and wait for another upload."""
    now = services.clock()
    await starts.list_once(services, start)
    waiting = await read(services.store, start.waiting, Waiting)
    if waiting is None:  # later looks write nothing
        waiting = Waiting(since=now)
        await services.store.put_if_absent(start.expected, b"")
        await services.store.put_if_absent(start.waiting, encode(waiting))
        log.info("job waits for files", job=str(start), missing=missing)
    if now - waiting.since < limits.job_missing_s:
        return True
    field = next(field for field, name in _fields(parsed) if name in missing)
    todo = f"Upload {', '.join(missing)} beside job.yaml: the job starts as soon as all are there"
    allowed = f"a file that is there within {limits.job_missing_s / 60:.0f} minutes"
    await _refuse(services, start, parsed.wrong(InvalidField(field, missing[0], allowed, todo)))
    return False


def _fields(parsed: Parsed) -> list[tuple[str, str]]:
    """(field, file) of every file that job.yaml names."""
    job = parsed.job
    fields = [("data", job.data)]
    if job.evaluate is not None:
        fields.append(("evaluate.data", job.evaluate.data))
    if isinstance(job, RlJob) and job.environment is not None:
        fields.append(("environment.code", job.environment.code))
    fields += [("reward", name) for name in job.files if name not in {file for _, file in fields}]
    return fields + [("sweep.over", name) for name in parsed.files if name not in job.files]


async def _refuse(services: JobServices, start: Start, error: JobError) -> None:
    """Report the error beside job.yaml, in the list of jobs and in the log."""
    await starts.list_once(services, start)
    report = error.report()
    listed = await services.store.list(start.refusals)
    newest = await read(services.store, listed[-1], Refusal) if listed else None
    if newest is None or newest.report != report:
        n = last_number(listed[-1]) if listed else 0
        refusal = Refusal(report=report, at=services.clock())
        await services.store.put_if_absent(f"{start.refusals}{number(n + 1)}", encode(refusal))
        log.error("job refused", job=str(start), reason=str(error))
    data = msgspec.json.format(msgspec.json.encode(report)) + b"\n"
    beside = f"{layout.inbox(start.tenant, start.job)}{names.JOB_ERROR}"
    if not await _is_published(services, beside, data):
        await services.exchange.publish(beside, data)


async def _is_published(services: JobServices, name: str, data: bytes) -> bool:
    try:
        blob = await services.exchange.read(name, len(data))
    except TooLarge:
        return False
    return blob is not None and blob.data == data


def _as_job_error(error: UserError) -> JobError:
    return error if isinstance(error, JobError) else JobError(1, "job.yaml", None, "", message=str(error))
