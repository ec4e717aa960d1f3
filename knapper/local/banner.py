"""What `knapper up` prints once it is ready: model, addresses, key, and how to stop."""

from collections.abc import Sequence
from pathlib import Path

from knapper.catalogue import servable
from knapper.engine.models import weight_files
from knapper.settings import Settings
from knapper.state.model_record import ModelRecord
from knapper.text.sizes import sized

_DEVICES = {"auto": "auto: cuda where there is one, else cpu; the log says which when the engine starts"}
_DTYPES = {"auto": "auto: the faster one, as the log says when the engine starts"}


def banner(settings: Settings, records: Sequence[ModelRecord], url: str) -> list[str]:
    """Lines, of which the first is `ready: URL`."""
    models = [line for record in records for line in _model(record)]
    if settings.keys:
        key = "one that `knapper key create TENANT` prints"
    else:
        key = "any that begins with tml-, as TINKER_API_KEY=tml-local"
    tenant = "TENANT" if settings.keys else "local"
    exchange = settings.exchange or str(settings.data)
    lines = {
        "device": _DEVICES.get(settings.device, settings.device),
        "dtype": _DTYPES.get(settings.dtype, settings.dtype),
        "data": settings.store or str(settings.data),
        "inbox": f"{exchange.rstrip('/')}/inbox/{tenant}/JOB/",
        "/v1": f"{url}/v1",
        "key": key,
        "stop": "Ctrl-C; what was acknowledged is kept",
    }
    return [f"ready: {url}", *(f"  {name:<7}{value}" for name, value in (*models, *lines.items()))]


def _model(record: ModelRecord) -> list[tuple[str, str]]:
    directory = Path(record.directory)
    read = sum(path.stat().st_size for path in weight_files.paths(directory)) - weight_files.skipped_bytes(directory)
    described = f"{record.arch}, {sized(read)}, {record.context} tokens of context, {record.computed_by}"
    lines = {"model": f"{record.name} ({described})"}
    if record.name != record.directory:
        lines["files"] = record.directory
    if left_out := servable.not_served(directory):
        lines["images"] = left_out
    return list(lines.items())
