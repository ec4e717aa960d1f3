"""Model names: a base model, a checkpoint, or a run or job, which stands for its newest sampler checkpoint."""

from dataclasses import dataclass

from gateway.services import Services
from knapper import ids, limits
from knapper.errors import InvalidField, NotFound
from knapper.ids import RunId, Tenant, TinkerPath
from knapper.jobs import job_names, names
from knapper.state.checkpoints import Checkpoint
from knapper.state.model_record import ModelRecord, slug

_CREATED = 0  # base models have no creation time, and clients want a number


@dataclass(frozen=True)
class SampledModel:
    """A base model, alone or with the adapter of a checkpoint."""

    record: ModelRecord
    checkpoint: Checkpoint | None = None

    @property
    def adapter(self) -> str:
        """Its name in the store; empty for none."""
        return self.checkpoint.bundle if self.checkpoint is not None else ""


async def resolve(gateway: Services, tenant: Tenant, name: str) -> SampledModel:
    """The model that the name stands for now. Raises NotFound, also for another tenant's name, and InvalidField."""
    try:
        checkpoint = await _checkpoint(gateway, tenant, name)
        model = await gateway.lookups.model(name if checkpoint is None else checkpoint.base_model)
    except NotFound as error:
        error.field = "model"
        raise
    if not model.sampleable:
        raise InvalidField("model", name, "a model that can be sampled; v1/models lists them")
    return SampledModel(model, checkpoint)


async def _checkpoint(gateway: Services, tenant: Tenant, name: str) -> Checkpoint | None:
    """None if the name stands for no checkpoint; it can then only be a base model's."""
    if name.startswith("tinker://"):
        named = await gateway.checkpoints.resolve(TinkerPath.parse(name, "model"), tenant)
        named.expect_plain()
        return named
    try:
        run = ids.run_id(name)
    except NotFound:
        return await _of_job(gateway, tenant, name)
    if (checkpoint := await _newest(gateway, tenant, run)) is None:
        raise NotFound(
            f"run {name!r} does not exist, or has no sampler checkpoint; save one with save_weights_for_sampler"
        )
    return checkpoint


async def _of_job(gateway: Services, tenant: Tenant, name: str) -> Checkpoint | None:
    """None if a base model has the name, or no job has. Raises NotFound for a job without a checkpoint yet."""
    if name in [model.name for model in await gateway.lookups.catalogue.models()]:
        return None
    run = await job_names.adapter_of(gateway.store, tenant, name)
    if run is None:
        return None
    if (checkpoint := await _newest(gateway, tenant, run)) is None:
        raise NotFound(f"job {name!r} has no adapter yet; `knapper jobs show {name}` says how far it is")
    return checkpoint


async def _newest(gateway: Services, tenant: Tenant, run: RunId) -> Checkpoint | None:
    labels = await gateway.checkpoints.labels(tenant, f"{run}/sampler_weights/")
    checkpoints = await gateway.checkpoints.read(labels[:1])
    return checkpoints[0] if checkpoints else None


async def listed(gateway: Services, tenant: Tenant) -> list[dict[str, object]]:
    """Base models, then the tenant's sampler checkpoints, the newest first, then the runs and jobs that have any."""
    models = [model.name for model in await gateway.lookups.catalogue.models() if model.sampleable]
    slugs = {slug(model) for model in models}
    labels = [label for label in await gateway.checkpoints.labels(tenant) if label.model in slugs]
    saved = [(label.path, int(label.saved_at)) for label in labels]
    saved = [(path, at) for path, at in saved if path.kind == "sampler_weights"][: limits.models_listed_max]
    newest = {path.run: at for path, at in reversed(saved)}
    jobs = await job_names.newest(gateway.store, tenant)
    ended = {path.run: at for path, at in reversed(saved) if path.name == names.FINAL}
    sweeps = {names.sweep_of(jobs[run]): at for run, at in ended.items() if run in jobs and names.sweep_of(jobs[run])}
    return (
        [description(name) for name in models]
        + [description(str(path), at) for path, at in saved]
        + [description(run, at) for run, at in newest.items()]
        + [description(jobs[run], at) for run, at in newest.items() if run in jobs and jobs[run] not in models]
        + [description(name, at) for name, at in sweeps.items() if name not in models]
    )


def description(name: str, created: int = _CREATED) -> dict[str, object]:
    """A model as clients see it. `created`: seconds since the epoch."""
    return {"id": name, "object": "model", "created": created, "owned_by": "knapper"}
