"""The checkpoint that a job begins with, as `init_from` names it."""

from knapper.errors import InvalidField, NotFound, UserError
from knapper.ids import Tenant, TinkerPath
from knapper.jobs.services import JobServices
from knapper.jobs.spec import AnyJob
from knapper.state.checkpoints import Checkpoints
from knapper.state.journal import bundles

_FIELD = "init_from"


async def bundle_of(services: JobServices, tenant: Tenant, job: AnyJob, path: str, base_model: str) -> str:
    """The checkpoint's files, which never change. Raises InvalidField for one that this job cannot go on from.

    Its adapter has the size and the parts that it has: `lora` must say the same, since nothing is cut or added.
    """
    try:
        parsed = TinkerPath.parse(path)
        checkpoint = await Checkpoints(services.store, services.clock).resolve(parsed, tenant)
        checkpoint.expect_plain()
        index = await bundles.read_index(services.store, checkpoint.bundle)
    except InvalidField as error:
        raise InvalidField(_FIELD, path, error.allowed, error.todo) from error
    except NotFound as error:
        todo = "`knapper checkpoints` and `knapper jobs show` name those that there are"
        raise InvalidField(_FIELD, path, "a checkpoint that this tenant may read", todo) from error
    except UserError as error:
        raise InvalidField(_FIELD, path, "a checkpoint that can be read here", str(error)) from error
    if index is None or parsed.kind == "external_weights":
        raise InvalidField(_FIELD, path, "a path of weights or sampler_weights whose files are there")
    if index.spec.base_model != base_model:
        allowed = f"a checkpoint of {base_model}, and this is one of {index.spec.base_model}"
        raise InvalidField(_FIELD, path, allowed, "Or name its model as `base_model`")
    for field in ("rank", "alpha", "train_attn", "train_mlp", "train_unembed"):
        own, its = getattr(job.lora, field), getattr(index.spec, field)
        if own != its:
            shown = str(its).lower() if isinstance(its, bool) else f"{its:g}"
            todo = f"Write `{field}: {shown}` below `lora:`"
            raise InvalidField(f"lora.{field}", own, f"{shown}, as the checkpoint of `{_FIELD}` has it", todo)
    return checkpoint.bundle
