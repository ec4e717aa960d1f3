"""What is checked before a job starts, so that no error that can be found then is met later."""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from knapper.catalogue.served_models import Catalogue
from knapper.errors import InvalidField, UserError
from knapper.ids import Tenant
from knapper.jobs import datasets, origins, spec
from knapper.jobs.names import Start
from knapper.jobs.rows import RlRow, Row
from knapper.jobs.services import JobServices
from knapper.jobs.spec import AnyJob, Parsed, RlJob
from knapper.jobs.sweep import search
from knapper.jobs.sweep.spec import SweepSpec
from knapper.jobs.upload import Upload
from knapper.jobs.yaml_document import JobError
from knapper.rewards import plain
from knapper.rewards import spec as rewards
from knapper.rewards.spec import Reward
from knapper.state.job_records import Started
from knapper.state.model_record import slug


async def expect_rank(services: JobServices, tenant: Tenant, rank: int) -> None:
    """Raises InvalidField for a rank above the tenant's quota."""
    most = await services.quota.rank(tenant)
    if most is not None and rank > most:
        raise InvalidField("lora.rank", rank, f"1 to {most}: the quota of tenant {tenant}")


async def checked(services: JobServices, start: Start, parsed: Parsed, whole: Upload) -> Started:
    """The record of the start. Raises UserError for every error that can be found before it."""
    files = {name: blob.data for name, blob in whole.files.items()}
    job = parsed.job
    await expect_rank(services, start.tenant, max(each.lora.rank for each in parsed.jobs))
    counts = [await _read(each, files) for each in _reading_otherwise(parsed.jobs)]
    rows, held_out = counts[0]
    if job.sweep is not None:
        _check_metric(job, job.sweep, files)
        search.expect_installed(job.sweep)
    model = await _model(services, job.base_model)
    source = await source_of(services, start.tenant, job, model)
    return Started(
        tenant=start.tenant, job=start.job, start=start.id, generation=whole.job_yaml.generation,
        generations=whole.generations, spec_json=spec.encode(job), job_yaml=whole.job_yaml.data,
        files=dict(whole.content.sha256s),
        files_bytes=sum(map(len, files.values())), base_model=model, model=slug(model), rows=rows, held_out=held_out,
        started_at=services.clock(), source=source,
    )  # fmt: skip


async def checked_trial(
    services: JobServices, sweep: Started, start: Start, parsed: Parsed, files: Mapping[str, bytes]
) -> Started:
    """The record of the start of a sweep's trial, which shares its sweep's files. Raises UserError."""
    job = parsed.job
    await expect_rank(services, start.tenant, job.lora.rank)
    rows, held_out = await _read(job, files)
    return Started(
        tenant=start.tenant, job=start.job, start=start.id, generation=sweep.generation, spec_json=spec.encode(job),
        job_yaml=parsed.document.text, files={name: sweep.files[name] for name in job.files}, files_bytes=0,
        base_model=sweep.base_model, model=sweep.model, rows=rows, held_out=held_out, started_at=services.clock(),
        source=await source_of(services, start.tenant, job, sweep.base_model), sweep=f"{sweep.job}/{sweep.start}",
    )  # fmt: skip


async def source_of(services: JobServices, tenant: Tenant, job: AnyJob, model: str) -> str:
    """The checkpoint that it begins with; empty for none. Raises InvalidField."""
    return "" if job.init_from is None else await origins.bundle_of(services, tenant, job, job.init_from, model)


def _reading_otherwise(jobs: Sequence[AnyJob]) -> Sequence[AnyJob]:
    """Those that read other files, or the same ones otherwise, than all before them; the first of them is."""
    other: dict[bytes, AnyJob] = {}
    for job in jobs:
        says = [getattr(job, name, None) for name in ("reward", "environment", "loss_on")]
        other.setdefault(msgspec.json.encode([job.files, says]), job)
    return list(other.values())


async def _read(job: AnyJob, files: Mapping[str, bytes]) -> tuple[int, int]:
    """(rows, held-out rows) of the job's files, all checked. Raises UserError."""
    rows = await asyncio.to_thread(datasets.rows, job, job.data, files[job.data])
    held_out: Sequence[Row] = []
    if job.evaluate is not None:
        held_out = await asyncio.to_thread(datasets.rows, job, job.evaluate.data, files[job.evaluate.data])
    if isinstance(job, RlJob) and job.environment is not None:
        rewards.text_of(job.environment.code, files[job.environment.code])
    elif isinstance(job, RlJob):
        reward = _reward(job, files)
        await asyncio.to_thread(_check_answers, reward, job.data, files[job.data], rows)
        if job.evaluate is not None:
            await asyncio.to_thread(_check_answers, reward, job.evaluate.data, files[job.evaluate.data], held_out)
    return len(rows), len(held_out)


def _check_metric(job: AnyJob, sweep: SweepSpec, files: Mapping[str, bytes]) -> None:
    """Raises InvalidField for a metric that the evaluations of a reward do not have; others are known before."""
    if isinstance(job, RlJob) and job.environment is None and sweep.metric is not None:
        labels = list(_reward(job, files).terms)
        known = ["reward/mean", *(f"reward/{label}" for label in labels if len(labels) > 1)]
        if sweep.metric not in known:
            raise InvalidField("sweep.metric", sweep.metric, f"{', '.join(known)}, of the evaluation")


def _reward(job: RlJob, files: Mapping[str, bytes]) -> Reward:
    try:
        return rewards.parse(job.reward, files)
    except UserError as error:
        error.field = error.field or "reward"
        raise


def _check_answers(reward: Reward, name: str, data: bytes, rows: Sequence[Row]) -> None:
    """Raises JobError for the first row whose answer a reward term cannot use."""
    for n, row in enumerate(rows):
        assert isinstance(row, RlRow), "the job is one of rl"
        for term in reward.terms.values():
            try:
                plain.check(term, row.answer)
            except UserError as error:
                line = datasets.line_of(name, data, n)
                raise JobError(line, "answer", row.answer, "", file=name, message=str(error)) from error


async def _model(services: JobServices, asked: str | None) -> str:
    """The served name. Raises InvalidField."""
    served = [model for model in await Catalogue(services.store).models() if model.trainable and model.sampleable]
    if asked is None and len(served) == 1:
        return served[0].name
    for model in served:
        if asked in (model.name, model.directory):
            return model.name
    shown = ", ".join(model.name for model in served) or "none is served at this moment"
    raise InvalidField("base_model", asked, shown)
